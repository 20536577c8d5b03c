# SPDX-License-Identifier: Apache-2.0
"""`qkern` and `python -m qkern`."""

import sys

from qkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
