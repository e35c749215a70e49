"""`python -m biflow` is `biflow`."""

import sys

from biflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
