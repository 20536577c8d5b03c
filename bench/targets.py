# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels are held to: fractions of the roofline, and distances to the peers.

A fraction is (larger of weight bytes / read bandwidth and operations / peak) / time, for M = 1, 4,
16, 64 and (256, 512). In every cell a kernel also has to be OVER_PEERS times as fast as the best
peer of its class, or at NEAR_LIMIT of the roofline where that would lie beyond the limit. Layers of
fewer than SMALLEST weights stay in the cache and live by their cost per call: bench_more.py.
"""

from __future__ import annotations

OVER_PEERS, NEAR_LIMIT = 1.25, 0.92
OVER_PEERS_AVX2 = 1.1  # of peers kept to AVX2 as well
SMALLEST = 1 << 22
ROWS = (1, 4, 16, 64, 256)

A8 = ("-a8", "-a8g")
_FRACTIONS = {
    tuple(f"int4-g128{z}{a}" for z in ("", "-asym") for a in A8): (95, 90, 60, 70, 78),
    tuple(f"int4-g32{z}{a}" for z in ("", "-asym") for a in A8): (92, 83, 50, 55, 60),
    tuple(f"{t}{a}" for t in ("codebook4", "nf4", "iq4nl", "mxfp4") for a in A8): (
        95, 85, 58, 68, 76),
    ("int8-a8", "int8-a8g"): (92, 88, 62, 75, 85),
    ("int4-g128", "int4-g128-asym", "nf4"): (88, 65, 75, 82, 85),
    ("codebook4",): (75, 60, 70, 80, 82),
    ("int8",): (90, 75, 75, 82, 85),
    tuple(f"{t}{a}" for t in ("codebook3", "int3-g64") for a in A8): (87, 60),
    ("codebook3", "int3-g64"): (65, 50),
    tuple(f"{t}{a}" for t in ("codebook2", "int2-g64") for a in ("", *A8)): (65, 50),
    ("lutb", "lutb-a8"): (60, 50),
}  # fmt: skip
FRACTIONS = {name: values for names, values in _FRACTIONS.items() for name in names}
# Format: (another one, most times its time) from M = 16 on; codebook4 at every M.
AGAINST = {
    "codebook3-a8": ("codebook4-a8", 1.15),
    "int3-g64-a8": ("int4-g64-a8", 1.15),
    "codebook3": ("codebook4", 1.15),
    "int3-g64": ("int4-g64", 1.15),
    "codebook2-a8": ("codebook4-a8", 1.15),
    "int2-g64-a8": ("int4-g64-a8", 1.15),
    "codebook2": ("codebook4", 1.15),
    "int2-g64": ("int4-g64", 1.15),
    "lutb-a8": ("codebook3-a8", 1.25),
    "lutb": ("codebook3", 1.25),
    "codebook4-a8": ("int4-g128-a8", 1.10),
    "codebook4-a8g": ("int4-g128-a8g", 1.10),
    "codebook4": ("int4-g128", 1.10),
}
AGAINST_FROM = {name: 1 if name.startswith("codebook4") else 16 for name in AGAINST}


def fraction(name: str, m: int) -> float | None:
    """The fraction of the roofline asked of a format at M, if one is."""
    values = FRACTIONS.get(name, ())
    column = ROWS.index(min(m, 256)) if min(m, 256) in ROWS else len(values)
    return values[column] / 100 if column < len(values) else None


def shortfalls(cell: dict, times: dict[str, float], over_peers: float = OVER_PEERS) -> list[str]:
    """What one cell of ours falls short of; `times` are ours by format in the same column."""
    if cell["n"] * cell["k"] < SMALLEST:
        return []
    found = []
    goal = fraction(cell["name"], cell["m"])
    if goal is not None and cell["roofline"] < goal:
        found.append(f"{cell['roofline']:.0%} of the roofline, {goal:.0%} asked")
    ratio = cell.get("ratio")
    if ratio is not None and ratio < over_peers and cell["roofline"] < NEAR_LIMIT:
        found.append(f"{ratio:.2f} x {cell['best_peer']}, {over_peers} asked")
    other, most = AGAINST.get(cell["name"], ("", 0.0))
    if other in times and cell["m"] >= AGAINST_FROM[cell["name"]]:
        factor = cell["ms"] / times[other]
        if factor > most:
            found.append(f"{factor:.2f} times the time of {other}, {most} allowed")
    return found
