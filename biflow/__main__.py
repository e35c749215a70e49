"""`python -m biflow`, and `torchrun -m biflow`: the command line."""

import sys

from biflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
