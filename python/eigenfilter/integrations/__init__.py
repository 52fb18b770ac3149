"""Sharpness-aware training in other frameworks: one module a framework.

A module is imported when it is first used, and needs its framework:

    pip install "eigenfilter[lightning]"     # and so on, by the module's name

See docs/integrations.
"""
