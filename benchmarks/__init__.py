"""Benchmarks: the library beside its peers, verified first, then timed in turns in one run.

The package has them as `eigenfilter.benchmarks`, through a link; `eigenfilter bench` runs them.
"""
