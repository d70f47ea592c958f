"""``python -m latentgnn``, and ``torchrun -m latentgnn``: the command line."""

import sys

from latentgnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
