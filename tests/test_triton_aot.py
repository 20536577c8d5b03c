# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels through the real compiler, without a GPU: for every target the result must use
matrix instructions where there are any, keep registers and shared memory within what the hardware
has, and spill nothing.

By default a selection; QKERN_TRITON_AOT=all compiles every configuration that can be chosen for all
targets (minutes).
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
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

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qkern.triton_kernels import Spec, configs, plan  # noqa: E402
from qkern.triton_kernels.activations import quantize_activations_kernel  # noqa: E402
from qkern.triton_kernels.configs import CANDIDATES, Config  # noqa: E402
from qkern.triton_kernels.dequantize_rows import dequantize_kernel  # noqa: E402
from qkern.triton_kernels.linear_finish import sum_parts_kernel  # noqa: E402
from qkern.triton_kernels.linear_float import linear_dot_kernel  # noqa: E402
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
DECODE = Config(16, 64, 128, 4, 4)
SPECS = (INT4, INT4_ASYM, INT3, INT8, NF4, MXFP4, NVFP4, ROWS4, GROUPS4, LUTB)


@dataclass(frozen=True)
class Result:
    """What the compiler made."""

    registers: int
    spilled: int  # bytes of local memory (plus accesses that the compiler itself put there)
    shared: int
    matrix: int  # matrix instructions
    wide: int  # loads and copies of 16 bytes from global memory
    text: str


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
        "table_scale": "fp32",
    }  # fmt: skip


def compile_kernel(
    kernel: Any,
    target: GPUTarget,
    spec: Spec,
    dtype: str,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    ones: tuple[str, ...] = (),
) -> SimpleNamespace:
    """All sizes and strides divisible by 16, as they mostly are; those in `ones` are 1."""
    types = pointer_types(spec, dtype, not constants.get("QUANTIZE", True))
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


Case = tuple[Any, Spec, str, dict[str, Any], int, int]


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
    return linear_dot_kernel, spec, dtype, constants, config.warps, config.stages


def gemv_case(spec: Spec, config: Config, m: int = 1, dtype: str = "bf16") -> Case:
    constants = {**plan.gemv_constants(spec, has_scales(spec), config, K, m), **ends(spec, False)}
    del constants["FOLD"]
    return linear_gemv_kernel, spec, dtype, constants, config.warps, config.stages


def int8_case(spec: Spec, config: Config, fold: bool = False, k: int = K) -> Case:
    constants = {**plan.int8_constants(spec, has_scales(spec), config, k), **ends(spec, fold)}
    return linear_int8_kernel, spec, "bf16", constants, config.warps, config.stages


def grad_case(spec: Spec, config: Config, dtype: str = "bf16") -> Case:
    constants = {**plan.grad_constants(spec, has_scales(spec), config, K), "PERM": False}
    return linear_grad_kernel, spec, dtype, constants, config.warps, config.stages


def grouped_case(spec: Spec, config: Config, fold: bool = True) -> Case:
    count = {"EXPERTS": 8, "EXPERTS_2": 8}
    config = configs.for_experts(config)
    if spec.activations == "float":
        kernel, _, dtype, constants, *_ = dot_case(spec, config, fold)
        kernel = grouped_dot_kernel
    else:
        kernel, _, dtype, constants, *_ = int8_case(spec, config, fold)
        kernel = grouped_int8_kernel
    return kernel, spec, dtype, {**constants, **count}, config.warps, config.stages


def plain_case(kernel: Any, spec: Spec, constants: dict[str, Any]) -> Case:
    return kernel, spec, "bf16", constants, 4, 3


def sum_case() -> Case:
    constants = {**plan.sum_constants(INT8, True), "PARTS": 8, "BIAS": True}
    return plain_case(sum_parts_kernel, INT8, constants)


def check(
    made: Result, arch: int, shared: int | None = None, matrix: bool = False, spill: int = 0
) -> None:
    """The result stays within the hardware, and within what `configs` said of shared memory."""
    assert made.registers <= 255
    assert made.spilled <= spill
    assert made.shared <= (SHARED[arch] if shared is None else min(shared, SHARED[arch]))
    assert (made.matrix > 0) == matrix


def device_of(arch: int) -> configs.Device:
    return configs.Device(f"sm_{arch}", arch, 128, SHARED[arch])


Loop = tuple[str, str, Config, Case, int, bool]


def loops(arch: int, specs: tuple[Spec, ...]) -> Iterator[Loop]:
    """(name, kind, configuration, case, bound of shared memory, uses matrix units) of everything
    that may be chosen for these specs on a device of this architecture."""
    for spec, (kind, candidates) in itertools.product(specs, CANDIDATES.items()):
        wide = kind.endswith("f32")
        element = 4 if wide else 2
        if kind == "int8":
            spec = replace(spec, activations="int8" if spec.group is None else "int8_group")
        for config in candidates:
            bound = configs.shared_bytes(kind, config, spec, element)
            name = f"sm{arch}-{kind}-{spec.name}-{'x'.join(map(str, astuple(config)))}"
            for split in (1, 2):
                if not configs.fits(kind, config, spec, element, device_of(arch), split):
                    continue
                if kind == "gemv":
                    case = gemv_case(spec, config, (1, 4)[split - 1])
                    yield f"{name}-m{case[3]['ROWS']}", kind, config, case, bound, False
                elif not kind.startswith("grad"):
                    make = {"dot": dot_case, "int8": int8_case}[kind.split("_")[0]]
                    extra = {"dtype": "fp32"} if wide else {}
                    case = make(spec, config, split > 1, **extra)
                    yield f"{name}-in{split}", kind, config, case, bound, not wide
                elif split == 1:
                    case = grad_case(spec, config, "fp32" if wide else "bf16")
                    yield name, kind, config, case, bound, not wide


def chosen() -> Iterator[Any]:
    """What runs untuned for the smallest batch in one part of K, and for the largest in several; or
    everything, where a few spilled registers are let pass: what is slow is not chosen."""
    for arch in NVIDIA:
        specs = SPECS if ALL else (INT4, NF4) if arch == 90 else (INT4,)
        for spec in specs:
            for name, kind, config, *rest in loops(arch, (spec,)):
                small = configs.default(kind, 16, device_of(arch), spec, 2)
                large = configs.default(kind, 256, device_of(arch), spec, 2, split=2)
                usual = (config == small and not name.endswith("in2")) or (
                    arch in (80, 90) and config == large and not name.endswith("in1")
                )
                if ALL or (usual and not kind.endswith("f32")):
                    yield pytest.param(arch, *rest, 64 if ALL else 0, id=name)


@pytest.mark.parametrize("arch,case,bound,matrix,spill", list(chosen()))
def test_loops(arch: int, case: Case, bound: int, matrix: bool, spill: int, tmp_path: Path) -> None:
    check(compiled(tmp_path, arch, *case), arch, bound, matrix, spill)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_every_format_compiles(spec: Spec, tmp_path: Path) -> None:
    """Ragged columns, with permutation and bias, for the decode tile."""
    config = DECODE
    case = dot_case(spec, config, k=K + 4, PERM=True, BIAS=True)
    check(compiled(tmp_path, 80, *case), 80, matrix=True)


@pytest.mark.parametrize("arch,instruction", [
    (80, "mma.sync"), (90, "wgmma.mma_async"), (100, "tcgen05.mma"), (120, "mma.sync"),
])  # fmt: skip
def test_one_instruction_whatever_the_batch(arch: int, instruction: str, tmp_path: Path) -> None:
    """The bits of a row are those of the instruction and of the order along K: the tile of a few
    rows and that of many use the same one, once for each of its steps along K."""
    for m in (1, 33, 65, 4096) if ALL or arch == 90 else (1, 4096):
        config = configs.default("dot", m, device_of(arch), INT4, 2)
        made = compiled(tmp_path, arch, *dot_case(INT4, config))
        used = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", made.text)
        assert set(used) == {instruction}
        if arch == 90:
            # 16 columns each, for every 64 rows of the weight; a warp group has 4 warps.
            assert len(used) == config.depth // 16 * (config.cols // 64) * 4 // config.warps


def test_packed_weights_are_copied_wide_and_stay_in_registers(tmp_path: Path) -> None:
    """On Hopper, int4: weights reach wgmma through registers, never as floats through shared
    memory; activations arrive by 16-byte copies."""
    config = DECODE
    made = compiled(tmp_path, 90, *dot_case(INT4, config))
    assert "wgmma.mma_async" in made.text
    first = re.search(r"wgmma\.mma_async\S+\s*\{[^}]*\}, \{", made.text)
    assert first, "the first operand of wgmma is a list of registers"
    assert made.wide >= 4
    # Codes and activations of every stage, and not one decoded weight.
    stage = config.rows * config.depth * 2 + config.cols * config.depth // 2
    assert made.shared <= stage * config.stages


def test_sizes_of_one(tmp_path: Path) -> None:
    """Arguments that are 1 become constants of the kernel: N = 1, M = 1, strides of 1."""
    for case, ones in (
        (dot_case(INT4, DECODE), ("M", "N")),
        (gemv_case(INT4, CANDIDATES["gemv"][0]), ("M", "N", "codes_stride", "scales_stride")),
        (int8_case(replace(INT8, activations="int8"), CANDIDATES["int8"][0]), ("M", "N")),
        (grad_case(INT4, CANDIDATES["grad"][0]), ("M", "N")),
        (dot_case(INT8, DECODE, k=1), ("K", "codes_stride", "SPAN")),
        (sum_case(), ("M", "N", "xs_stride")),
        (plain_case(quantize_activations_kernel, INT4,
                    {"PERM": False, **plan.quantize_constants(1)}), ("K", "GROUP", "GROUPS")),
    ):  # fmt: skip
        matrix = case[0] in (linear_dot_kernel, linear_int8_kernel, linear_grad_kernel)
        check(compiled(tmp_path, 80, *case, ones=ones), 80, matrix=matrix, spill=128)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_other_kernels(arch: int, tmp_path: Path) -> None:
    for spec in (INT4_ASYM, MXFP4, ROWS4) if ALL else (MXFP4,) if arch == 90 else (INT4,):
        dequantize = plan.dequantize_constants(spec, has_scales(spec), K, K)
        for case in (
            plain_case(dequantize_kernel, spec, {**dequantize, "IDS": False, "PERM": False}),
            plain_case(dequantize_kernel, spec, {**dequantize, "IDS": True, "PERM": True}),
        ):
            check(compiled(tmp_path, arch, *case), arch)
        config = DECODE
        check(compiled(tmp_path, arch, *grouped_case(spec, config)), arch, matrix=True)
    for activations in (A8, A8G):
        case = grouped_case(replace(INT4, activations=activations), CANDIDATES["int8"][0])
        check(compiled(tmp_path, arch, *case), arch, matrix=True)
    case = int8_case(replace(LUTB, activations=A8G), CANDIDATES["int8"][0])
    check(compiled(tmp_path, arch, *case), arch, matrix=True)
    for group in (32, K):
        case = plain_case(
            quantize_activations_kernel, INT4, {"PERM": False, **plan.quantize_constants(group)}
        )
        check(compiled(tmp_path, arch, *case), arch)
    check(compiled(tmp_path, arch, *sum_case()), arch)


def test_rounding_of_activations_is_not_fused(tmp_path: Path) -> None:
    """x * inverse must be rounded before it is rounded to an integer: no multiply-add may do
    both."""
    case = plain_case(quantize_activations_kernel, INT4,
                      {"PERM": False, **plan.quantize_constants(K)})  # fmt: skip
    text = compiled(tmp_path, 90, *case).text
    # 1.5 * 2^23 = 0x4B400000 is added after the clamp; a fused form would carry it as an addend.
    fused = [line for line in text.splitlines() if "fma" in line and "0f4B400000" in line]
    assert "0f4B400000" in text or "0fCB400000" in text
    assert not fused


@pytest.mark.parametrize("kind", ["dot", "int8", "gemv", "grad"])
def test_amd(kind: str) -> None:
    """gfx942, as far as the installed triton can: matrix instructions, no scratch memory."""
    if "hip" not in triton.backends.backends and "amd" not in triton.backends.backends:
        pytest.skip("this triton cannot compile for AMD")
    target = GPUTarget("hip", "gfx942", 64)
    device = configs.GENERIC
    spec = replace(INT4, activations="int8_group") if kind == "int8" else INT4
    config = configs.default(kind, 16, device, spec, 2)
    make = {"dot": dot_case, "int8": int8_case, "gemv": gemv_case, "grad": grad_case}[kind]
    kernel, _, dtype, constants, warps, _ = make(spec, config)
    made = compile_kernel(kernel, target, spec, dtype, constants, warps, 2)
    text = made.asm["amdgcn"]
    if kind != "gemv":
        assert "v_mfma" in text
    assert re.search(r"\.private_segment_fixed_size:\s+0\b", text)
    assert made.metadata.shared <= 65536
