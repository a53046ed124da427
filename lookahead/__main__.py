"""`python -m lookahead` is the command `lookahead`."""

import sys

from lookahead.cli import main

if __name__ == "__main__":
    sys.exit(main())
