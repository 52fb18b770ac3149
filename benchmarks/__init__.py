"""Benchmarks: the library beside its peers, verified first, then timed in turns in one run.

They are no part of the package. `python -m benchmarks` runs them, as `eigenfilter bench` does.
"""
