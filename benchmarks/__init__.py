"""Benchmarks: the library beside its peers, verified first, then timed in turns in one run.

python -m benchmarks.run --list
python -m benchmarks.run [--only NAME] [--device cpu|cuda] [--repeat N] [--out DIR]
"""
