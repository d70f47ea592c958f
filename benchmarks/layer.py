"""The layer beside its peers; the same as `latentgnn benchmark layer`, with results into benchmarks/results.

python benchmarks/layer.py [--shapes C3,C4] [--rounds 7] [--threads 2]
"""

import sys
from pathlib import Path

from latentgnn.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", "layer", "--out", str(Path(__file__).parent / "results"), *sys.argv[1:]]))
