# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels through the real compiler, without a GPU: for every target the result must use
matrix instructions where there are any, keep registers and shared memory within what the hardware
has, and spill nothing.

A selection by default; QKERN_TRITON_AOT=all compiles every configuration that can be chosen for all
targets (an hour; `triton_aot_all.py` does the same, goes on where it was interrupted, and writes
TRITON_AOT.md and TRITON_AOT_3.6.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the Triton kernels need torch")
triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    pytest.skip(
        "sources are compiled ahead of time as triton 3.4 and newer do it", allow_module_level=True
    )

import triton_aot as aot  # noqa: E402
import triton_aot_all as everything  # noqa: E402
from qkern.triton_kernels import Spec, configs, plan  # noqa: E402
from qkern.triton_kernels.activations import quantize_activations_kernel  # noqa: E402
from qkern.triton_kernels.configs import CANDIDATES, Config  # noqa: E402
from triton_aot import (  # noqa: E402
    AMD,
    INT4,
    INT8,
    MXFP4,
    NF4,
    NVIDIA,
    SPECS,
    Case,
    K,
    Loop,
    Result,
    compiled,
    dot_case,
    gemv_case,
    grad_case,
    int8_case,
    sum_case,
)

ALL = os.environ.get("QKERN_TRITON_AOT") == "all"
DECODE = Config(16, 64, 128, 4, 4)
if not aot.tool("cuobjdump").exists():
    pytest.skip("cuobjdump is not part of this triton", allow_module_level=True)


def check(made: Result, target: int, matrix: bool = False, spilled: int = 0) -> None:
    """The result stays within the hardware, and in registers."""
    assert made.registers <= 255
    assert made.spilled <= spilled
    assert made.shared <= aot.device_of(target).shared
    assert (made.matrix > 0) == matrix


def usual(target: int, loop: Loop) -> bool:
    """What runs untuned for the smallest batch in one part of K, and on two targets for the largest
    in several."""
    if loop.kind.endswith("f32") or loop.experts or loop.case.spec.activations == "int8":
        return False
    if loop.kind == "gemv" and loop.case.spec.activations != "float":
        return False
    spec, device = loop.case.spec, aot.device_of(target)
    small = loop.split == 1 and loop.config == configs.default(loop.kind, 16, device, spec, 2)
    large = loop.split == 2 and loop.config == configs.default(loop.kind, 256, device, spec, 2, 2)
    return small or (large and target in (80, 90))


def selected() -> Iterator[Any]:
    for target in aot.TARGETS if ALL else NVIDIA:
        specs = (INT4, NF4) if target == 90 else (INT4,)
        chosen = everything.everything(target) if ALL else aot.loops(target, specs)
        for loop in chosen:
            if not loop.excluded and (ALL or usual(target, loop)):
                yield pytest.param(target, loop, id=loop.name)


@pytest.mark.parametrize("target,loop", list(selected()))
def test_loops(target: int, loop: Loop) -> None:
    assert not everything.faults(loop, everything.facts_of(loop, target), target)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_format_compiles(spec: Spec) -> None:
    """Ragged columns, with permutation and bias, for the decode tile."""
    case = dot_case(spec, DECODE, k=K + 4, PERM=True, BIAS=True)
    check(compiled(case, 80), 80, matrix=True)


@pytest.mark.parametrize("target,instruction", [
    (80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma"), (120, "mma.sync"),
])  # fmt: skip
def test_one_instruction_whatever_the_batch(target: int, instruction: str) -> None:
    """The bits of a row are those of the instruction and of the order along K: the tile of a few
    rows and that of many use the same one, once for each of its steps along K."""
    for m in (1, 33, 65, 4096) if ALL or target == 90 else (1, 4096):
        config = configs.default("dot", m, aot.device_of(target), INT4, 2)
        made = compiled(dot_case(INT4, config), target)
        used = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", made.text)
        assert set(used) == {instruction}
        if target == 90:
            # 16 columns each, for every 64 rows of the weight; a warp group has 4 warps.
            assert len(used) == config.depth // 16 * (config.cols // 64) * 4 // config.warps


def test_packed_weights_are_copied_wide_and_stay_in_registers() -> None:
    """On Hopper, int4: weights reach wgmma through registers, never as floats through shared
    memory; activations arrive by 16-byte copies."""
    config = DECODE
    made = compiled(dot_case(INT4, config), 90)
    assert "wgmma.mma_async" in made.text
    first = re.search(r"wgmma\.mma_async\S+\s*\{[^}]*\}, \{", made.text)
    assert first, "the first operand of wgmma is a list of registers"
    assert made.wide >= 4
    # Codes and activations of every stage, and not one decoded weight.
    stage = config.rows * config.depth * 2 + config.cols * config.depth // 2
    assert made.shared <= stage * config.stages


def test_sizes_of_one() -> None:
    """Arguments that are 1 become constants of the kernel: N = 1, M = 1, strides of 1."""
    single = {"PERM": False, **plan.quantize_constants(1)}
    for case, ones, matrix in (
        (dot_case(INT4, DECODE), ("M", "N"), True),
        (gemv_case(INT4, CANDIDATES["gemv"][0]), ("M", "N", "codes_stride", "scales_stride"),
         False),
        (int8_case(replace(INT8, activations="int8"), CANDIDATES["int8"][0]), ("M", "N"), True),
        (grad_case(INT4, CANDIDATES["grad"][0]), ("M", "N"), True),
        (dot_case(INT8, DECODE, k=1), ("K", "codes_stride", "SPAN"), True),
        (sum_case(), ("M", "N", "xs_stride"), False),
        (Case(quantize_activations_kernel, INT4, "bf16", single), ("K", "GROUP", "GROUPS"), False),
    ):  # fmt: skip
        # A weight of a single column has tiles that are masked but for it, whose addresses ptxas
        # keeps in 88 bytes of local memory: right, slow, and no layer.
        check(compiled(case, 80, ones), 80, matrix, spilled=128 if "K" in ones and matrix else 0)


@pytest.mark.parametrize("target,spec", [(80, INT4), (90, MXFP4), (AMD, INT4)])
def test_the_other_kernels(target: int, spec: Spec) -> None:
    """Without a choice of tiles, and the lowest tile of the experts."""
    for loop in aot.other_loops(target, (spec,)):
        if "ragged" not in loop.name:
            assert not everything.faults(loop, everything.facts_of(loop, target), target), loop.name
    for kind, activations in (("dot", "float"), ("int8", "int8"), ("int8", "int8_group"),
                              ("grad", "float")):  # fmt: skip
        own = replace(spec, activations=activations)
        config = configs.default(kind, 16, aot.device_of(target), own, 2, experts=True)
        loop = aot.loop_of(target, kind, own, config, 1, experts=True)
        assert not everything.faults(loop, everything.facts_of(loop, target), target), loop.name


def test_rounding_of_activations_is_not_fused() -> None:
    """x * inverse must be rounded before it is rounded to an integer: no multiply-add may do
    both."""
    constants = {"PERM": False, **plan.quantize_constants(K)}
    text = compiled(Case(quantize_activations_kernel, INT4, "bf16", constants), 90).text
    # 1.5 * 2^23 = 0x4B400000 is added after the clamp; a fused form would carry it as an addend.
    fused = [line for line in text.splitlines() if "fma" in line and "0f4B400000" in line]
    assert "0f4B400000" in text or "0fCB400000" in text
    assert not fused


@pytest.mark.parametrize("spec", [INT4, NF4], ids=lambda s: s.name)
@pytest.mark.parametrize("kind", ["dot", "int8", "gemv", "grad"])
def test_amd(kind: str, spec: Spec) -> None:
    """gfx942: matrix instructions, no scratch memory."""
    own = replace(spec, activations="int8_group") if kind == "int8" else spec
    config = configs.default(kind, 16, aot.device_of(AMD), own, 2)
    loop = aot.loop_of(AMD, kind, own, config, 1)
    assert not everything.faults(loop, everything.facts_of(loop, AMD), AMD)


def test_a_fault_is_told() -> None:
    """What would be wrong with a result, and that the table says so."""
    loop = next(aot.loops(80, (INT4,)))
    good = {"registers": 200, "spilled": 0, "shared": 1024, "matrix": 0}
    assert everything.faults(loop, good, 80) == []
    assert everything.faults(loop, {"error": "RuntimeError: no"}, 80) == ["RuntimeError: no"]
    bad = {"registers": 300, "spilled": 8, "shared": 1 << 20, "matrix": 4}
    assert len(everything.faults(loop, bad, 80)) == 4
    lines, wrong = everything.report({everything.key_of(loop): {**good, "spilled": 8}}, [80])
    assert wrong == 1 and lines[-1] == f"- {loop.name}: 8 bytes of local memory"
    known = sum(not loop.excluded for loop in everything.named(80).values())
    assert f"| sm_80 | 1 of {known} | 200 | 1024 bytes | 8 bytes " in lines[7]
