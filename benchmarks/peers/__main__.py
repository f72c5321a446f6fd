"""``python -m benchmarks.peers``."""

import sys

from benchmarks.peers.compare import command
from kvmem.bench.__main__ import main

if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.peers"))
