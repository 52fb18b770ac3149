"""`python -m benchmarks`, from the root of a checkout: what `eigenfilter bench` runs."""

import sys

from eigenfilter.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
