"""`python -m eigenfilter`: the command line, for torchrun too."""

import sys

from eigenfilter.experiments.cli import main

sys.exit(main())
