# SPDX-License-Identifier: Apache-2.0
"""The tables of a result of compare.py: `python bench/compare_report.py FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import targets
from peers import CLASSES

Cells = list[dict[str, Any]]


def report(result: dict[str, Any]) -> str:
    head = (
        f"{result['machine']}, {result['threads']} threads, {result['isa']}, our activations "
        f"{result['dtype']}, commit {result['commit']}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [head, versions, *(f"absent: {f}: {why}" for f, why in result["absent"].items())]
    cells = result["cells"]
    for n, k in dict.fromkeys((c["n"], c["k"]) for c in cells):
        for kind in dict.fromkeys(c["class"] for c in cells if (c["n"], c["k"]) == (n, k)):
            chosen = [c for c in cells if (c["n"], c["k"], c["class"]) == (n, k, kind)]
            parts.append(f"\n### {n} x {k}: {CLASSES[kind]}\n")
            parts.append(table(chosen))
    parts += ["", *failures(cells), "", *missed(result)]
    return "\n".join(parts)


def table(cells: Cells) -> str:
    """Ours first: time, fraction of the roofline, times as fast as the best peer. Then peers."""
    rows = sorted({c["m"] for c in cells})
    names = dict.fromkeys(c["name"] for c in sorted(cells, key=lambda c: c["family"] != "qkern"))
    lines = [
        "| | " + " | ".join(f"M={m}" for m in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    best = {m: min((c["ms"] for c in cells if c["m"] == m and is_peer(c)), default=0) for m in rows}
    lines.append(
        "| **best peer** | "
        + " | ".join(next((text(c) for c in cells if c["m"] == m and is_peer(c)
                           and c["ms"] == best[m]), "none") for m in rows)
        + " |"
    )  # fmt: skip
    for name in names:
        found = {c["m"]: c for c in cells if c["name"] == name}
        mark = "**" if next(iter(found.values()))["family"] == "qkern" else ""
        texts = [figures(found[m]) if m in found else "" for m in rows]
        lines.append(f"| {mark}{name}{mark} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def is_peer(cell: dict[str, Any]) -> bool:
    return cell["family"] != "qkern" and "ms" in cell


def text(cell: dict[str, Any]) -> str:
    return f"{cell['ms']:.3g} ms {cell['name']}"


def figures(cell: dict[str, Any]) -> str:
    if "ms" not in cell:
        return "failed"
    parts = [f"{cell['ms']:.3g} ms", f"{cell['roofline']:.0%}"]
    if "ratio" in cell:
        parts.append(f"{cell['ratio']:.2f}x")
        if cell["best_peer_any"] != cell["best_peer"]:
            parts.append(f"(int8: {cell['ratio_any']:.2f}x)")
    return " ".join(parts)


def failures(cells: Cells) -> list[str]:
    """Each failure once, with the cells it befell."""
    found: dict[tuple[str, str], list[str]] = {}
    for c in cells:
        if c.get("failed"):
            where = f"{c['n']} x {c['k']} M={c['m']}"
            found.setdefault((c["name"], c["failed"]), []).append(where)
    return [f"failed: {name} ({', '.join(where)}): {why}" for (name, why), where in found.items()]


def missed(result: dict[str, Any]) -> list[str]:
    over = targets.OVER_PEERS_AVX2 if result["isa"] == "avx2" else targets.OVER_PEERS
    ours = [c for c in result["cells"] if c["family"] == "qkern" and "ms" in c]
    times: dict[tuple, dict[str, float]] = {}
    for c in ours:
        times.setdefault((c["n"], c["k"], c["m"]), {})[c["name"]] = c["ms"]
    lines = []
    for c in ours:
        for why in targets.shortfalls(c, times[c["n"], c["k"], c["m"]], over):
            lines.append(f"short: {c['n']} x {c['k']} {c['name']} M={c['m']}: {why}")
    return [f"{len(ours)} cells, {len(lines)} targets missed", *lines]


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())))
