# SPDX-License-Identifier: Apache-2.0
"""Pictures of a result of compare.py: `python bench/plots.py FILE.json [--shape 4096x4096]`.

FILE-roofline.png: rate over arithmetic intensity, ours and the best peer of each class, under the
measured limits. FILE-ratio.png: how many times as fast as the best peer, format by rows.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from PIL import Image
from roofline import PEAKS

Cells = list[dict[str, Any]]
# Colour of a class: Okabe and Ito's set, which colour-blind readers can tell apart.
COLOURS = {
    "int4-g128-a8": "#0072B2",
    "int4-g64-a8": "#999999",
    "int4-g32-a8": "#56B4E9",
    "int4": "#009E73",
    "codebook4": "#D55E00",
    "int8-a8": "#CC79A7",
    "int8": "#E69F00",
}
plt.rcParams |= {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip


def caption(result: dict[str, Any], n: int, k: int) -> str:
    return f"{n} x {k}, {result['machine'].split(',')[0]}, {result['threads']} threads"


def draw_roofline(result: dict[str, Any], cells: Cells, n: int, k: int, path: Path) -> None:
    int8_peak, float_peak = PEAKS[result["isa"]]
    limits = {
        name: statistics.median(c["limits"][name] for c in cells if name in c["limits"])
        for name in ("read_gbs", int8_peak, float_peak)
    }
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    arithmetics = (("int8", "int8 activations", int8_peak),
                   ("float", "float activations", float_peak))  # fmt: skip
    for panel, (arithmetic, title, peak) in zip(panels, arithmetics, strict=True):
        chosen = [c for c in cells if c["arithmetic"] == arithmetic]
        for kind in [c for c in COLOURS if any(x["class"] == c for x in chosen)]:
            of_kind = [c for c in chosen if c["class"] == kind]
            ours = fastest([c for c in of_kind if c["family"] == "qkern"])
            line(panel, ours, COLOURS[kind], marker="o", label=kind)
            peers = fastest([c for c in of_kind if c["family"] != "qkern"])
            line(panel, peers, COLOURS[kind], marker="x", linestyle=":", alpha=0.8)
        reach = [intensity(c) for c in chosen] or [1.0, 1000.0]
        x = np.geomspace(min(reach) / 1.6, max(reach) * 1.6, 200)
        panel.plot(x, np.minimum(x * limits["read_gbs"], limits[peak]), color="black", lw=1.6)
        panel.set_title(title)
        panel.text(x[-1], limits[peak] * 1.06, f"{limits[peak]:.0f} Gop/s", ha="right")
        high = min(limits[peak] / limits["read_gbs"], x[-1]) / 1.3
        panel.text(high, high * limits["read_gbs"], f"{limits['read_gbs']:.1f} GB/s ",
                   ha="right", va="bottom")  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="operations per byte of weight")
        panel.grid(True, which="major", color="#e6e6e6", lw=0.7)
        panel.set_axisbelow(True)
        panel.legend(title="solid: qkern, dotted: best peer", loc="lower right",
                     alignment="left", ncols=2, columnspacing=1.2)  # fmt: skip
    panels[0].set_ylabel("Gop/s")
    figure.suptitle(caption(result, n, k), x=0.01, ha="left")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """With a palette of 128 colours, which is a third of the bytes."""
    memory = io.BytesIO()
    figure.savefig(memory, dpi=120)
    plt.close(figure)
    image = Image.open(memory).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def fastest(cells: Cells) -> Cells:
    """The fastest cell for each number of rows."""
    rows = sorted({c["m"] for c in cells})
    return [min((c for c in cells if c["m"] == m), key=lambda c: c["ms"]) for m in rows]


def intensity(cell: dict[str, Any]) -> float:
    return 2 * cell["m"] * cell["n"] * cell["k"] / cell["bytes"]


def line(panel: Any, cells: Cells, colour: str, **style: Any) -> None:
    if cells:
        x, y = [intensity(c) for c in cells], [c["gops"] for c in cells]
        panel.plot(x, y, color=colour, markersize=5, lw=1.2, **style)


def draw_ratios(result: dict[str, Any], cells: Cells, n: int, k: int, path: Path) -> None:
    ours = [c for c in cells if c["family"] == "qkern" and "ratio" in c]
    names = list(dict.fromkeys(c["name"] for c in ours))
    rows = sorted({c["m"] for c in ours})
    if not names:
        print("no cell has a peer: no picture of ratios")
        return
    grid = np.full((len(names), len(rows)), np.nan)
    labels: dict[tuple[int, int], tuple[str, str]] = {}
    for c in ours:
        where = names.index(c["name"]), rows.index(c["m"])
        grid[where] = c["ratio"]
        labels[where] = f"{c['ratio']:.2f}x", f"{short(c['best_peer'])}, {c['roofline']:.0%}"
    size = (max(6.8, 2.2 + 1.75 * len(rows)), 1.3 + 0.42 * len(names))
    figure, panel = plt.subplots(figsize=size, layout="constrained")
    # Equal to the peer is white; colours follow the logarithm, so 2x and 0.5x are as strong.
    shown = np.clip(np.log2(grid), -1.5, 2.5)
    panel.imshow(shown, cmap="RdBu", norm=TwoSlopeNorm(0, -1.5, 2.5), aspect="auto")
    for (row, column), (value, facts) in labels.items():
        dark = not -0.9 < shown[row, column] < 1.55
        style = {"ha": "center", "color": "white" if dark else "black"}
        panel.text(column, row - 0.04, value, va="bottom", fontsize=9, weight="bold", **style)
        panel.text(column, row + 0.06, facts, va="top", fontsize=7, **style)
    panel.set_xticks(range(len(rows)), [f"M = {m}" for m in rows])
    panel.set_yticks(range(len(names)), names)
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    panel.set_xticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    panel.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    panel.grid(which="minor", color="white", lw=2)
    panel.tick_params(which="minor", length=0)
    panel.spines[:].set_visible(False)
    figure.suptitle(
        f"Times as fast as the best peer of the class (its name; fraction of the roofline)\n"
        f"{caption(result, n, k)}", x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    save(figure, path)


def short(name: str) -> str:
    """A peer's name that fits into a cell."""
    for long, brief in (("MatMulNBits ", ""), ("DynamicQuantizeMatMul", "DynQuantMatMul"),
                        ("linear_dynamic ", ""), ("OpenVINO", "OV"), (" repack", ""),
                        ("bitsandbytes", "bnb"), (" DQ off", "")):  # fmt: skip
        name = name.replace(long, brief)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--shape", help="NxK; else the first one of the file")
    args = parser.parse_args()
    result = json.loads(args.file.read_text())
    timed = [c for c in result["cells"] if "ms" in c and c["class"] != "reference"]
    sizes = list(dict.fromkeys((c["n"], c["k"]) for c in timed))
    size = tuple(map(int, args.shape.split("x"))) if args.shape else next(iter(sizes), None)
    if size not in sizes:
        raise SystemExit(f"{args.file} has no times of {args.shape or 'any shape'}: {sizes}")
    cells = [c for c in timed if (c["n"], c["k"]) == size]
    mark = "" if size == sizes[0] else "-{}x{}".format(*size)
    for draw, what in ((draw_roofline, "roofline"), (draw_ratios, "ratio")):
        path = args.file.with_name(f"{args.file.stem}{mark}-{what}.png")
        draw(result, cells, *size, path)
        print(path)


if __name__ == "__main__":
    main()
