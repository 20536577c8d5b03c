# SPDX-License-Identifier: Apache-2.0
"""The README's support table, made from the list of kernels.

`python bench/support_table.py` prints it; `--write` puts it between the markers of README.md.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from qkern.testing import Case

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
LEVELS = {
    "x86-64": ("avx512amx", "avx512vnni", "avx512", "avx2"),
    "aarch64": ("neoni8mm", "neondot", "neon"),
}
LIST = Path(__file__).resolve().parents[1] / "csrc" / "cpu" / "kernels.inc"
# What a row reads, as the registry says it: the word, the kind of weight, the lanes.
TOKENS = (
    ("int", "kInt", "kDwordLanes"),
    ("table", "kTable", "kDwordLanes"),
    ("row-table", "kTable", "kRowLanes"),
    ("tile-table", "kTable", "kTileTables"),
)
WEIGHTS = {
    "int{b}": (None, (2, 3, 4, 5, 6, 8)),
    "nf4, fp4, iq4nl, mxfp4, nvfp4; codebook{b}-tensor": ("tensor", (4,)),
    "codebook{b}-tensor": ("tensor", (2, 3, 8)),
    "codebook{b}, codebook{b}-group (a table per row or group)": ("row", (2, 3, 4, 8)),
    "lutb (a table per tile of 8 x 64, {b} bits)": ("tile", (3,)),
}


def registry() -> list[dict]:
    """The linear kernels of csrc/cpu/kernels.inc, of all processors, in the words of the registry
    (`qkern.kernels()` knows those of the processor that it was compiled for)."""
    pattern = r"^QKERN_LINEAR\((\w+),\s*([^,]+),\s*(\w+),\s*([\w()]+),\s*(\w+)\)"
    rows = []
    for name, kinds, lanes, bits, activations in re.findall(pattern, LIST.read_text(), re.M):
        widths = "1-8" if bits == "kAllBits" else ",".join(re.findall(r"\d+", bits))
        tokens = [token for token, kind, lane in TOKENS
                  if kind in kinds and lanes in (lane, "kAnyLanes")]  # fmt: skip
        modes = "float" if activations == "kFloat" else "int8, int8_group"
        weights = f"{widths} bits: {' '.join(tokens)}"
        isa = name.rpartition("_")[2]
        rows.append({"name": name, "isa": isa, "weights": weights, "activations": modes})
    return rows


# What other operations run on: the macro of the list, in words.
OPERATIONS = {
    "QUANTIZE": "quantize_activations; the same within linear, conv, grouped_linear",
    "CONVERT": "float16 and bfloat16 activations to float32",
    "DEQUANTIZE": "dequantize, embedding: canonical storage, every format",
    "UNPACK": "dequantize, embedding, gradient to the input: packed weights, every format",
    "MATMUL": "int8_matmul",
}


def operation_rows() -> list[str]:
    """One line per operation without a choice of formats: its levels on each processor."""
    text, lines = LIST.read_text(), []
    for macro, words in OPERATIONS.items():
        isas = {
            name.rpartition("_")[2] for name in re.findall(rf"^QKERN_{macro}\((\w+)", text, re.M)
        }
        cells = [
            ", ".join([*(level for level in names if level in isas), "scalar"])
            for names in LEVELS.values()
        ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def levels(case: Case, rows: list[dict], names: tuple[str, ...]) -> str:
    served = [level for level in names
              if any(r["isa"] == level and case.served_by(r) for r in rows)]  # fmt: skip
    return ", ".join([*served, "scalar"])


def table() -> str:
    rows = registry()
    groups = [f"{mode}, {processor}" for processor in LEVELS for mode in ("float", "int8")]
    lines = [f"| weights | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for text, (table_per, widths) in WEIGHTS.items():
        for bits in widths:
            cells = [
                levels(Case(bits, mode, table=table_per), rows, names)
                for names in LEVELS.values()
                for mode in ("float", "int8")
            ]
            lines.append(f"| {' | '.join([text.format(b=bits), *cells])} |")
    lines += ["", f"| other operations | {' | '.join(LEVELS)} |", "|---" * (len(LEVELS) + 1) + "|"]
    return "\n".join([*lines, *operation_rows()])


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
