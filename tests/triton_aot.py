# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels through the real compiler, without a GPU: how, and what can be chosen.

`test_triton_aot.py` checks a selection; everything is compiled by `triton_aot_all.py`.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qkern.triton_kernels import Spec, configs, decode, plan
from qkern.triton_kernels.activations import quantize_activations_kernel
from qkern.triton_kernels.configs import CANDIDATES, Config, Device
from qkern.triton_kernels.dequantize_rows import dequantize_kernel
from qkern.triton_kernels.linear_finish import sum_parts_kernel
from qkern.triton_kernels.linear_float import linear_dot_kernel
from qkern.triton_kernels.linear_gemv import linear_gemv_kernel
from qkern.triton_kernels.linear_grad import linear_grad_kernel
from qkern.triton_kernels.linear_grouped import (
    grouped_dot_kernel,
    grouped_grad_kernel,
    grouped_int8_kernel,
)
from qkern.triton_kernels.linear_int8 import linear_int8_kernel

K = 4096  # divides by every tile: the case of most layers
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
NVIDIA = tuple(SHARED)
AMD = 942
TARGETS = (*NVIDIA, AMD)

INT4 = Spec("int", 4, 128)
INT4_ASYM = Spec("int", 4, 128, symmetric=False)
INT3 = Spec("int", 3, 64)
INT8 = Spec("int", 8)
NF4 = Spec("table", 4, 64, table_per="tensor")
MXFP4 = Spec("table", 4, 32, table_per="tensor", scale_type="e8m0")
NVFP4 = Spec("table", 4, 16, table_per="tensor", scale_type="e4m3")
ROWS4 = Spec("table", 4, table_per="row")
GROUPS4 = Spec("table", 4, 64, table_per="group")
LUTB = Spec("table", 3, table_per="tile", table_type="e4m3")
SPECS = (INT4, INT4_ASYM, INT3, INT8, NF4, MXFP4, NVFP4, ROWS4, GROUPS4, LUTB)


NO_TILE = Config(0, 0, 0, 4, 3)


@dataclass(frozen=True)
class Result:
    """What the compiler made."""

    registers: int
    spilled: int  # bytes of local memory (plus accesses that the compiler itself put there)
    shared: int
    matrix: int  # matrix instructions
    wide: int  # loads and copies of 16 bytes from global memory
    text: str


@dataclass(frozen=True)
class Case:
    """One kernel with its constants."""

    kernel: Any
    spec: Spec
    dtype: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3


def name_of(target: int) -> str:
    return "gfx942" if target == AMD else f"sm_{target}"


def device_of(target: int) -> Device:
    if target == AMD:
        return Device(name_of(target), 0, 304, configs.GENERIC.shared)
    return Device(name_of(target), target, 128, SHARED[target])


# ---- compiling ----


def stored_scale(spec: Spec) -> bool:
    """Formats with float8 scales store one more for the whole tensor."""
    return spec.scale_type == "e4m3"


def pointer_types(spec: Spec, dtype: str, quantized: bool) -> dict[str, str]:
    """Types of all pointer arguments, by name. `quantized`: x is int8 already."""
    scales = "*u8" if spec.scale_type != "float" else "*fp16"
    tables = "*u8" if spec.table_type != "float" else "*fp32"
    return {
        **dict.fromkeys(("y", "dy", "dx", "bias"), f"*{dtype}"),
        "x": "*i8" if quantized else f"*{dtype}",
        **dict.fromkeys(("xs", "parts", "table_scales"), "*fp32"),
        "q": "*i8",
        **dict.fromkeys(("perm", "offsets"), "*i32"),
        "ids": "*i64", "codes": "*u8", "scales": scales, "zeros": "*u8", "table": tables,
        "table_scale": "*fp32" if stored_scale(spec) else "fp32",
    }  # fmt: skip


@contextmanager
def compiling_for(target: int) -> Iterator[None]:
    """`decode` asks torch once which vendor it is for; here a target may be of the other."""
    before = decode.NVIDIA
    decode.NVIDIA = tl.constexpr(target != AMD)
    try:
        yield
    finally:
        decode.NVIDIA = before


def source_of(case: Case, ones: tuple[str, ...] = ()) -> ASTSource:
    """All sizes and strides divisible by 16, as they mostly are; those in `ones` are 1."""
    names = case.kernel.arg_names
    integers = case.spec.activations != "float" and not case.constants.get("QUANTIZE", False)
    types = pointer_types(case.spec, case.dtype, integers)
    signature = {name: types.get(name, "i32") for name in names}
    # Activations are dense along their columns.
    ones = ("x_stride_k", "dy_stride_n", *ones)
    fixed = {**case.constants, **{name: 1 for name in ones if name in signature}}
    if "SCALE_STORED" in signature:
        fixed["SCALE_STORED"] = stored_scale(case.spec)
    for name in fixed:
        signature[name] = "constexpr"
    index = {name: (i,) for i, name in enumerate(names)}
    aligned = [n for n, t in signature.items() if t not in ("constexpr", "fp32")]
    return ASTSource(
        case.kernel, signature, {index[name]: value for name, value in fixed.items()},
        {index[name]: [["tt.divisibility", 16]] for name in aligned},
    )  # fmt: skip


def tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def compiled(case: Case, target: int, ones: tuple[str, ...] = ()) -> Result:
    gpu = GPUTarget("hip", "gfx942", 64) if target == AMD else GPUTarget("cuda", target, 32)
    with compiling_for(target):
        made = triton.compile(
            source_of(case, ones),
            target=gpu,
            options={"num_warps": case.warps, "num_stages": case.stages},
        )
    return of_amd(made) if target == AMD else of_nvidia(made)


def of_nvidia(made: SimpleNamespace) -> Result:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(made.asm["cubin"])
        binary.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = made.asm["ptx"]
    return Result(
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"] + len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        shared=made.metadata.shared,
        matrix=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync", ptx)),
        wide=len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg|ld\.global\S*v2\.b64", ptx)),
        text=ptx,
    )


def of_amd(made: SimpleNamespace) -> Result:
    text = made.asm["amdgcn"]
    found = dict(re.findall(r"^\s*\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text, re.M))
    return Result(
        registers=int(found["vgpr_count"]),
        spilled=int(found["private_segment_fixed_size"]),
        shared=made.metadata.shared,
        matrix=len(re.findall(r"\bv_mfma", text)),
        wide=len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        text=text,
    )


# ---- kernels with their constants ----


def has_scales(spec: Spec) -> bool:
    return spec.kind == "int" or (spec.group is not None and spec.table_per != "group")


def ends(spec: Spec, fold: bool) -> dict[str, Any]:
    """How a sum ends where one program makes all of it, of one part of K or (fold) of several."""
    return {
        "PERM": False,
        "BIAS": False,
        "FOLD": fold,
        "FACTOR": plan.factor(spec, has_scales(spec)),
    }


def dot_case(
    spec: Spec, config: Config, fold: bool = False, dtype: str = "bf16", k: int = K, **more: Any
) -> Case:
    constants = {**plan.dot_constants(spec, has_scales(spec), config, k), **ends(spec, fold),
                 **more}  # fmt: skip
    return Case(linear_dot_kernel, spec, dtype, constants, config.warps, config.stages)


def gemv_case(spec: Spec, config: Config, m: int = 1, dtype: str = "bf16") -> Case:
    constants = {**plan.gemv_constants(spec, has_scales(spec), config, K, m), **ends(spec, False)}
    del constants["FOLD"]
    return Case(linear_gemv_kernel, spec, dtype, constants, config.warps)


def int8_case(spec: Spec, config: Config, fold: bool = False, k: int = K) -> Case:
    constants = {**plan.int8_constants(spec, has_scales(spec), config, k), **ends(spec, fold)}
    return Case(linear_int8_kernel, spec, "bf16", constants, config.warps, config.stages)


def grad_case(spec: Spec, config: Config, dtype: str = "bf16") -> Case:
    constants = {**plan.grad_constants(spec, has_scales(spec), config, K), "PERM": False}
    return Case(linear_grad_kernel, spec, dtype, constants, config.warps, config.stages)


def grouped_case(case: Case) -> Case:
    """The same loop over the tokens of one of 8 experts."""
    kernel = {
        linear_dot_kernel: grouped_dot_kernel,
        linear_int8_kernel: grouped_int8_kernel,
        linear_grad_kernel: grouped_grad_kernel,
    }[case.kernel]
    stages = configs.for_experts(Config(0, 0, 0, case.warps, case.stages)).stages
    constants = {**case.constants, **plan.expert_constants(8)}
    return replace(case, kernel=kernel, constants=constants, stages=stages)


def sum_case() -> Case:
    constants = {**plan.sum_constants(INT8, True), "PARTS": 8, "BIAS": True}
    return Case(sum_parts_kernel, INT8, "bf16", constants)


@dataclass(frozen=True)
class Loop:
    """One kernel of those to choose from."""

    name: str
    kind: str
    config: Config
    case: Case
    bound: int  # of shared memory, as `configs` has it
    matrix: bool  # it uses matrix units
    split: int  # parts of K
    experts: bool = False
    excluded: bool = False  # it has room, but the compiler fails it, and it is not chosen


def variants(specs: tuple[Spec, ...], kinds: Iterable[str]) -> Iterator[tuple[str, Spec]]:
    """Kinds of loops with the specs that they serve."""
    for spec, kind in itertools.product(specs, kinds):
        if kind != "int8":
            yield kind, spec
        if kind in ("int8", "gemv"):
            yield kind, replace(spec, activations="int8")
            yield kind, replace(spec, activations="int8_group")


def loop_of(
    target: int, kind: str, spec: Spec, config: Config, split: int, experts: bool = False
) -> Loop | None:
    """None where the hardware has no room for it."""
    wide = kind.endswith("f32")
    element, dtype = (4, "fp32") if wide else (2, "bf16")
    device = device_of(target)
    if not configs.has_room(kind, config, spec, element, device, split):
        return None
    if kind == "gemv":
        case = gemv_case(spec, config, 4 if split > 1 else 1)  # rows of x, and no parts to sum
    elif kind == "int8":
        case = int8_case(spec, config, split > 1)
    elif kind.startswith("dot"):
        case = dot_case(spec, config, split > 1, dtype)
    elif split > 1:
        return None
    else:
        case = grad_case(spec, config, dtype)
    if experts:
        case = grouped_case(case)
    return Loop(
        name=f"{name_of(target)}-{configs.loop_name(kind, config, spec, split, experts)}",
        kind=kind,
        config=config,
        case=case,
        bound=configs.shared_bytes(kind, config, spec, element, device),
        matrix=kind != "gemv" and not (wide and target != AMD),
        split=split,
        experts=experts,
        excluded=configs.is_excluded(kind, config, spec, device, split, experts),
    )


def loops(target: int, specs: tuple[Spec, ...]) -> Iterator[Loop]:
    """Everything that there is to choose from for these specs on a target."""
    for kind, spec in variants(specs, CANDIDATES):
        for config, split in itertools.product(CANDIDATES[kind], (1, 2)):
            if loop := loop_of(target, kind, spec, config, split):
                yield loop


def expert_loops(target: int, specs: tuple[Spec, ...]) -> Iterator[Loop]:
    """The same for mixtures of experts, whose tiles are those that need no tuning, and those that
    would be if the compiler managed them."""
    device = device_of(target)
    for kind, spec in variants(specs, [kind for kind in CANDIDATES if kind != "gemv"]):
        element = 4 if kind.endswith("f32") else 2
        for split in (1, 2):
            # An expert's share of the tokens counts as 128 at most.
            shares = configs.BUCKETS[:-1]
            tiles = {configs.default(kind, m, device, spec, element, split, True) for m in shares}
            tiles |= {configs.for_experts(tile) for tile in CANDIDATES[kind]
                      if configs.is_excluded(kind, tile, spec, device, split, True)}  # fmt: skip
            for config in sorted(tiles):
                if loop := loop_of(target, kind, spec, config, split, experts=True):
                    yield loop


def other_loops(target: int, specs: tuple[Spec, ...]) -> Iterator[Loop]:
    """The kernels without a choice of tiles."""
    cases: dict[str, Case] = {}
    for spec, whole in itertools.product(specs, (True, False)):
        k = K if whole else K + 4
        constants = plan.dequantize_constants(spec, has_scales(spec), k, k)
        for ids in (False, True):
            words = f"dequantize-{spec.name}{'-rows' * ids}{'-ragged' * (not whole)}"
            cases[words] = Case(
                dequantize_kernel, spec, "bf16", {**constants, "IDS": ids, "PERM": ids}
            )
    for group in (32, K):
        constants = {"PERM": False, **plan.quantize_constants(group)}
        cases[f"quantize_activations-{group}"] = Case(
            quantize_activations_kernel, INT4, "bf16", constants
        )
    cases["sum_parts"] = sum_case()
    for words, case in cases.items():
        shared = device_of(target).shared
        yield Loop(f"{name_of(target)}-{words}", "other", NO_TILE, case, shared, False, 1)
