"""`python -m rlx.cli`."""

import sys

from rlx.cli import main

if __name__ == "__main__":  # not in a process that `rlx benchmark` spawns
    sys.exit(main())
