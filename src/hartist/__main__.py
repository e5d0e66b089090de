"""`python -m hartist` is the command `hartist`."""

from __future__ import annotations

import sys

from hartist.cli import main

if __name__ == "__main__":
    sys.exit(main())
