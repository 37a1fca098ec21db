"""`python -m jsoftmax verify | train | lm`."""

import sys

from jsoftmax.cli import main

if __name__ == "__main__":
    sys.exit(main())
