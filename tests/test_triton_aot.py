# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels through the real compiler, without a GPU: for every target the result must use
matrix instructions where there are any, keep registers and shared memory within what the hardware
has, and spill nothing.

By default a selection; QKERN_TRITON_AOT=all compiles every configuration that can be chosen for all
targets (minutes).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the Triton kernels need torch")
triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    pytest.skip("sources are compiled ahead of time as triton 3.4 and newer do it",
                allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qkern.triton_kernels import Spec, configs, plan  # noqa: E402
from qkern.triton_kernels.activations import quantize_activations_kernel  # noqa: E402
from qkern.triton_kernels.configs import CANDIDATES, Config  # noqa: E402
from qkern.triton_kernels.dequantize_rows import dequantize_kernel  # noqa: E402
from qkern.triton_kernels.linear_float import linear_dot_kernel, sum_parts_kernel  # noqa: E402
from qkern.triton_kernels.linear_gemv import linear_gemv_kernel  # noqa: E402
from qkern.triton_kernels.linear_grad import linear_grad_kernel  # noqa: E402
from qkern.triton_kernels.linear_grouped import (  # noqa: E402
    grouped_dot_kernel,
    grouped_int8_kernel,
)
from qkern.triton_kernels.linear_int8 import linear_int8_kernel  # noqa: E402

ALL = os.environ.get("QKERN_TRITON_AOT") == "all"
K = 4096  # divides by every tile: the case of most layers
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
NVIDIA = tuple(SHARED)

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
A8 = "int8"
A8G = "int8_group"
SPECS = (INT4, INT4_ASYM, INT3, INT8, NF4, MXFP4, NVFP4, ROWS4, GROUPS4, LUTB)


@dataclass(frozen=True)
class Result:
    """What the compiler made."""

    registers: int
    spilled: int  # bytes of local memory
    shared: int
    matrix: int  # matrix instructions
    wide: int  # loads and copies of 16 bytes from global memory
    text: str


def pointer_types(spec: Spec, dtype: str) -> dict[str, str]:
    """Types of all pointer arguments, by name."""
    scales = "*u8" if spec.scale_type != "float" else "*fp16"
    tables = "*u8" if spec.table_type != "float" else "*fp32"
    return {
        **dict.fromkeys(("x", "y", "dy", "dx", "bias"), f"*{dtype}"),
        **dict.fromkeys(("xs", "parts", "table_scales"), "*fp32"),
        **dict.fromkeys(("xq", "q"), "*i8"),
        **dict.fromkeys(("perm", "offsets"), "*i32"),
        "ids": "*i64", "codes": "*u8", "scales": scales, "zeros": "*u8", "table": tables,
        "table_scale": "fp32",
    }  # fmt: skip


def compile_kernel(kernel: Any, target: GPUTarget, spec: Spec, dtype: str, constants: dict[str, Any],
                   warps: int, stages: int, ones: tuple[str, ...] = ()) -> SimpleNamespace:
    """All sizes and strides divisible by 16, as they mostly are; those in `ones` are 1."""
    types = pointer_types(spec, dtype)
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    # Activations are dense along their columns.
    ones = ("x_stride_k", "dy_stride_n", *ones)
    fixed = {**constants, **{name: 1 for name in ones if name in signature}}
    for name in fixed:
        signature[name] = "constexpr"
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    aligned = [n for n, t in signature.items() if t not in ("constexpr", "fp32")]
    source = ASTSource(
        kernel, signature, {index[name]: value for name, value in fixed.items()},
        {index[name]: [["tt.divisibility", 16]] for name in aligned},
    )  # fmt: skip
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def nvidia_tool(name: str, *arguments: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / name
    if not path.exists():
        pytest.skip(f"{name} is not part of this triton")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def compiled(tmp_path: Path, arch: int, *arguments: Any, **options: Any) -> Result:
    made = compile_kernel(arguments[0], GPUTarget("cuda", arch, 32), *arguments[1:], **options)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    usage = nvidia_tool("cuobjdump", "--dump-resource-usage", str(binary))
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = made.asm["ptx"]
    spills = len(re.findall(r"\b(?:ld|st)\.local", ptx))
    return Result(
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"] + spills,
        shared=made.metadata.shared,
        matrix=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync", ptx)),
        wide=len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg|ld\.global\S*v2\.b64", ptx)),
        text=ptx,
    )


def dot_case(spec: Spec, config: Config, dtype: str = "bf16", k: int = K, **more: Any) -> tuple:
    constants = {**plan.dot_constants(spec, has_scales(spec), config, k), "PERM": False,
                 "BIAS": False, **more}  # fmt: skip
    return linear_dot_kernel, spec, dtype, constants, config.warps, config.stages


def gemv_case(spec: Spec, config: Config, m: int = 1, dtype: str = "bf16") -> tuple:
    constants = {**plan.gemv_constants(spec, has_scales(spec), config, K, m), "PERM": False,
                 "BIAS": False}  # fmt: skip
    return linear_gemv_kernel, spec, dtype, constants, config.warps, config.stages


def int8_case(spec: Spec, config: Config, k: int = K) -> tuple:
    constants = {**plan.int8_constants(spec, has_scales(spec), config, k), "BIAS": False}
    return linear_int8_kernel, spec, "bf16", constants, config.warps, config.stages


def grad_case(spec: Spec, config: Config, dtype: str = "bf16") -> tuple:
    constants = {**plan.grad_constants(spec, has_scales(spec), config, K), "PERM": False}
    return linear_grad_kernel, spec, dtype, constants, config.warps, config.stages


def has_scales(spec: Spec) -> bool:
    return spec.kind == "int" or spec.group is not None and spec.table_per != "group"
