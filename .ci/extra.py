# SPDX-License-Identifier: Apache-2.0
"""Prints the requirements of one extra of pyproject.toml, without building the package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    match = re.search(rf"^{re.escape(sys.argv[1])} = \[(.*?)\]", section, re.S | re.M)
    if not match:
        sys.exit(f"pyproject.toml has no extra called {sys.argv[1]}")
    print(" ".join(re.findall(r'"([^"]+)"', match[1])))
