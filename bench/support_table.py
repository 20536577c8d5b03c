# SPDX-License-Identifier: Apache-2.0
"""The README's support table, made from the kernel registry.

`python bench/support_table.py` prints it; `--write` puts it between the markers of README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qkern import _core
from qkern.testing import Case

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
LEVELS = ("avx512vnni", "avx512", "avx2")
WEIGHTS = {
    "int{b}": (None, (2, 3, 4, 5, 6, 8)),
    "nf4, fp4, iq4nl, mxfp4, nvfp4; codebook{b}-tensor": ("tensor", (4,)),
    "codebook{b}-tensor": ("tensor", (2, 3, 8)),
    "codebook{b}, codebook{b}-group (a table per row or group)": ("row", (2, 3, 4, 8)),
    "lutb (a table per tile of 8 x 64, {b} bits)": ("tile", (3,)),
}


def levels(case: Case, rows: list[dict]) -> str:
    served = [level for level in LEVELS
              if any(r["isa"] == level and case.served_by(r) for r in rows)]  # fmt: skip
    return ", ".join([*served, "scalar"])


def table() -> str:
    rows = [r for r in _core.kernels() if r["op"] == "linear"]
    lines = [
        "| weights | float activations | int8 activations (per row, per group) |",
        "|---|---|---|",
    ]
    for text, (table_per, widths) in WEIGHTS.items():
        for bits in widths:
            cells = [levels(Case(bits, a, table=table_per), rows) for a in ("float", "int8")]
            lines.append(f"| {text.format(b=bits)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    if "--write" not in sys.argv[1:]:
        print(table())
        return
    readme = Path(__file__).resolve().parents[1] / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
