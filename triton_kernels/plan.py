# SPDX-License-Identifier: Apache-2.0
"""From a spec and a configuration to the constants of a kernel: pure functions, shared by the ops,
the ahead-of-time compilation and the tests."""

from __future__ import annotations

from .configs import STEP, Config, scale_mode
from .spec import INT8_CHUNK, Spec

TABLE = {None: 0, "tensor": 1, "row": 2, "group": 3, "tile": 4}
ENCODING = {"float": 0, "e8m0": 1, "e4m3": 2}


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def weight_constants(spec: Spec, has_scales: bool, depth: int, k: int) -> dict[str, int | bool]:
    """The converter of a weight (see `decode`) for tiles of `depth` columns."""
    return {
        "BITS": spec.bits,
        "TABLE": TABLE[spec.table_per],
        "TABLE_TYPE": ENCODING[spec.table_type],
        "SYMMETRIC": spec.symmetric,
        "GROUP": spec.group or 1,
        "SCALES": scale_mode(spec.group, has_scales, depth),
        "SCALE_TYPE": ENCODING[spec.scale_type],
        "FULL": k % depth == 0,
    }


def factor(spec: Spec, has_scales: bool) -> int:
    """What multiplies a whole sum at the end: FACTOR of `linear_finish`."""
    if spec.activations == "float":
        return int(not has_scales or spec.group is None)
    return 2 if spec.activations == "int8" else 0


def dot_constants(spec: Spec, has_scales: bool, config: Config, k: int) -> dict[str, int | bool]:
    return {
        **weight_constants(spec, has_scales, config.depth, k),
        "BM": config.rows,
        "BN": config.cols,
        "BK": config.depth,
    }


def gemv_constants(
    spec: Spec, has_scales: bool, config: Config, k: int, m: int
) -> dict[str, int | bool]:
    return {
        **weight_constants(spec, has_scales, config.depth, k),
        "INT8": spec.activations != "float",
        "X_GROUP": spec.activation_group() or 0,
        "ROWS": 1 if m == 1 else 2 if m == 2 else 4,
        "BN": config.cols,
        "BK": config.depth,
        "STAGES": config.stages,
    }


def int8_constants(spec: Spec, has_scales: bool, config: Config, k: int) -> dict[str, int | bool]:
    """Steps never cross a chunk; a chunk that is no power of two ends in a masked step."""
    chunk = spec.chunk()
    depth = min(config.depth, max(32, next_power_of_2(chunk)))
    whole = k % depth == 0 if chunk >= k else chunk % depth == 0 and k % chunk == 0
    constants = weight_constants(spec, has_scales, depth, k)
    constants["SCALES"] = 0 if not has_scales else 1 if spec.group is None else 2
    return {
        **constants,
        "X_GROUP": spec.activation_group() or 0,
        "QUANTIZE": quantizes(spec, config),
        "CHUNK": chunk,
        "ALIGNED": chunk % 8 == 0 or (8 % spec.bits == 0 and chunk * spec.bits % 8 == 0),
        "FULL": whole,
        "BM": config.rows,
        "BN": config.cols,
        "BK": depth,
    }


def quantizes(spec: Spec, config: Config) -> bool:
    """Whether the programs quantize the activations they need: few rows, one group per step. With
    more rows, or a scale that needs the whole row first, that work would be done too often."""
    return config.rows <= 16 and (spec.activation_group() or INT8_CHUNK) <= config.depth


def step(spec: Spec) -> int:
    """What a part of K is a multiple of: of every depth, and never the depth itself, lest the parts
    depend on the tile; whole chunks where sums are integers."""
    return STEP if spec.activations == "float" or spec.chunk() == INT8_CHUNK else spec.chunk()


def sum_constants(spec: Spec, has_scales: bool) -> dict[str, int | bool]:
    """Of the kernel that sums parts: a row's single scale, if it has one, is all it reads."""
    return {
        "FACTOR": factor(spec, has_scales),
        "TABLE": TABLE[spec.table_per],
        "SCALES": int(has_scales),
        "SCALE_TYPE": ENCODING[spec.scale_type],
        "BLOCK": 256,
    }


def grad_constants(spec: Spec, has_scales: bool, config: Config, k: int) -> dict[str, int | bool]:
    return {
        **weight_constants(spec, has_scales, config.depth, k),
        "BM": config.rows,
        "BN": config.cols,
        "BK": config.depth,
    }


def expert_constants(experts: int) -> dict[str, int]:
    return {"EXPERTS": experts, "EXPERTS_2": next_power_of_2(experts)}


def dequantize_constants(spec: Spec, has_scales: bool, k: int, rows: int) -> dict[str, int | bool]:
    depth = min(256, max(32, next_power_of_2(k)))
    return {
        **weight_constants(spec, has_scales, depth, k),
        "BN": 1 if rows == 1 else 16,
        "BK": depth,
    }


def quantize_constants(group: int) -> dict[str, int]:
    """Blocks of up to 4096 columns; several groups share a program where they are short."""
    block = min(4096, max(32, next_power_of_2(group)))
    return {"MANY": max(1, 1024 // block) if group < 1024 else 1, "BLOCK": block}
