# SPDX-License-Identifier: Apache-2.0
"""Weights, numbers and oracles for the tests of the Triton kernels, in numpy alone.

The tests run in Triton's interpreter on the CPU (a process with TRITON_INTERPRET=1, which
`test_triton_interpreter.py` starts) or, where there is a GPU, compiled on it. The interpreter runs
one representative of each class where others would only repeat it; QKERN_TRITON_INTERPRETER=all
runs them too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels need torch")
pytest.importorskip("triton", reason="the Triton kernels need triton")

from qkern.triton_kernels import Spec  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ALL = not INTERPRETED or os.environ.get("QKERN_TRITON_INTERPRETER") == "all"


def patch_language_once() -> None:
    """Triton's interpreter patches triton.language anew at every call of a function within a
    kernel, a third of the time of these tests; once for each module is enough."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if INTERPRETED:
    patch_language_once()


def require_kernels() -> None:
    """At the head of a module of kernel tests: skip it where kernels can run neither way."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip(
            "no GPU; test_triton_interpreter.py runs this module interpreted",
            allow_module_level=True,
        )


INTEGERS = (
    Spec("int", 4, 32),
    Spec("int", 4, 32, symmetric=False),
    Spec("int", 3, 64),
    Spec("int", 2, 16, symmetric=False),
    Spec("int", 8),
    Spec("int", 8, symmetric=False),
    Spec("int", 5, 24, symmetric=False),
    Spec("int", 6, 128),
    Spec("int", 1, 40),
    Spec("int", 7),
)
TABLES = (
    Spec("table", 4, 64, table_per="tensor"),
    Spec("table", 4, table_per="tensor", table_scale=0.5),
    Spec("table", 4, 32, table_per="tensor", scale_type="e8m0"),
    Spec("table", 4, 16, table_per="tensor", scale_type="e4m3", table_scale=0.25),
    Spec("table", 4, table_per="row"),
    Spec("table", 3, table_per="row"),
    Spec("table", 8, table_per="row"),
    Spec("table", 2, 32, table_per="group"),
    Spec("table", 3, table_per="tile", table_type="e4m3"),
)
SPECS = INTEGERS + TABLES


def name_of(value: object) -> str | None:
    """Test ids for specs; pytest's own for the rest."""
    if isinstance(value, Spec):
        return value.name + ("" if value.scale_type == "float" else "-" + value.scale_type)
    return None


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    n, k = codes.shape
    spread = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(spread.reshape(n, k * bits), axis=1, bitorder="little")


def e4m3(byte: np.ndarray) -> np.ndarray:
    return torch.from_numpy(byte).view(torch.float8_e4m3fn).float().numpy()


def e8m0(byte: np.ndarray) -> np.ndarray:
    return np.where(byte == 255, np.nan, np.ldexp(1.0, byte.astype(np.int32) - 127)).astype("f4")


def padded(array: np.ndarray, poison: float) -> torch.Tensor:
    """The array as a view into rows that are longer by three numbers of poison: strides are odd,
    and a read beyond a row shows in the result."""
    wide = np.full((array.shape[0], array.shape[1] + 3), poison).astype(array.dtype)
    wide[:, : array.shape[1]] = array
    return torch.from_numpy(wide).to(DEVICE)[:, : array.shape[1]]


@dataclass
class Weight:
    """One weight: its parts as the kernels take them, and its value ``w`` [n, k] by the contract,
    in float32, columns in the order of storage."""

    spec: Spec
    n: int
    k: int
    parts: dict[str, torch.Tensor]
    w: np.ndarray

    @property
    def dense(self) -> np.ndarray:
        """[n, k] with columns in input order."""
        if "perm" not in self.parts:
            return self.w
        out = np.empty_like(self.w)
        out[:, self.parts["perm"].cpu().numpy()] = self.w
        return out


def make_scales(spec: Spec, shape: tuple[int, int], rng: np.random.Generator, exact: bool):
    """(stored, float32). Exact ones are powers of two between 1/4 and 2."""
    power = rng.integers(-2, 2, shape)
    if spec.scale_type == "e8m0":
        stored = (power + 127).astype(np.uint8)
        return stored, e8m0(stored)
    if spec.scale_type == "e4m3":
        stored = ((power + 7) << 3).astype(np.uint8)
        stored = stored if exact else rng.integers(1, 0x7F, shape).astype(np.uint8)
        return stored, e4m3(stored)
    value = np.ldexp(1.0, power) if exact else rng.uniform(0.01, 1.0, shape)
    kind = np.float16 if spec.group is not None and spec.bits <= 4 else np.float32
    return value.astype(kind), value.astype(kind).astype(np.float32)


def make_table(spec: Spec, n: int, k: int, rng: np.random.Generator, exact: bool):
    """(stored, float32) [tables, entries]; integers where exact or for int8 activations."""
    shape = (spec.tables(n, k), 2**spec.bits)
    if spec.table_type == "e4m3":
        stored = rng.integers(0, 0x7F, shape).astype(np.uint8) | (rng.integers(0, 2, shape) << 7)
        stored = stored.astype(np.uint8)
        if spec.activations != "float":
            # Exponents at most 3 below the largest: integers times one power of two.
            exponent = rng.integers(5, 10, (shape[0], 1)) - rng.integers(0, 4, shape)
            stored = (stored & 0x87 | exponent << 3).astype(np.uint8)
        if exact:
            stored = np.array([0x00, 0x38, 0x40, 0x44, 0x48, 0xB8, 0xC0, 0xC8], np.uint8)[
                rng.integers(0, 8, shape)
            ]  # 0, 1, 2, 3, 4 and some negatives
        return stored, e4m3(stored)
    if exact or spec.activations != "float":
        table = rng.integers(-8, 8, shape)
    else:
        table = rng.normal(size=shape)
    return table.astype(np.float32), table.astype(np.float32)


def make_weight(
    spec: Spec,
    n: int,
    k: int,
    seed: int = 0,
    exact: bool = True,
    perm: bool = False,
    float_zeros: bool = False,
) -> Weight:
    """Random parts; with `exact`, all numbers are small integers times powers of two."""
    rng = np.random.default_rng([seed, n, k, spec.bits])
    spec = spec.of_columns(k)
    codes = rng.integers(0, 2**spec.bits, (n, k)).astype(np.uint8)
    groups = spec.groups(k)
    parts = {"codes": padded(pack_bits(codes, spec.bits), 255)}
    columns = np.arange(k) // (spec.group or k)
    scale = np.ones((n, k), np.float32)
    if spec.kind == "int" or (spec.group and spec.table_per != "group"):
        stored, value = make_scales(spec, (n, groups), rng, exact)
        parts["scales"] = padded(stored, 255 if stored.dtype == np.uint8 else np.nan)
        scale = value[:, columns]
    if spec.kind == "int":
        zero = np.full((n, k), 2.0 ** (spec.bits - 1), np.float32)
        if not spec.symmetric:
            stored = rng.integers(0, 2**spec.bits, (n, groups)).astype(np.uint8)
            if float_zeros:
                stored = (stored + rng.uniform(-0.5, 0.5, stored.shape)).astype(np.float16)
            parts["zeros"] = padded(stored, 255 if stored.dtype == np.uint8 else np.nan)
            zero = stored.astype(np.float32)[:, columns]
        w = scale * (codes.astype(np.float32) - zero)
    else:
        stored, table = make_table(spec, n, k, rng, exact)
        parts["codebook"] = torch.from_numpy(stored).to(DEVICE)
        row = np.arange(n)[:, None]
        index = {
            "tensor": 0 * row,
            "row": row,
            "group": row * groups + columns,
            "tile": row // 8 * -(-k // 64) + np.arange(k) // 64,
        }[spec.table_per or ""]
        w = (scale * np.float32(spec.table_scale)) * table[np.broadcast_to(index, (n, k)), codes]
    if perm:
        order = rng.permutation(k).astype(np.int32)
        parts["perm"] = torch.from_numpy(order).to(DEVICE)
    return Weight(spec, n, k, parts, w)


def cast(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Float32 as a kernel stores it. The interpreter (not the compiler) cuts float32 to bfloat16
    instead of rounding."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    if INTERPRETED and dtype == torch.bfloat16:
        tensor = (tensor.view(torch.int32) & -65536).view(torch.float32)
    return tensor.to(dtype)


def small_integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype(np.float32)


def quantizable(rng: np.random.Generator, m: int, k: int, group: int | None) -> np.ndarray:
    """float32 [m, k] that int8 holds exactly: small integers times a power of two per group, with
    127 times that in each group, so that every scale is a power of two."""
    x = small_integers(rng, m, k)
    step = group or k
    for first in range(0, k, step):
        x[:, first + rng.integers(min(step, k - first))] = 127
        x[:, first : first + step] *= 2.0 ** int(rng.integers(-2, 2))
    return x


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal numbers (so +0 equals -0), NaN in the same places, same type; and not all zeros."""
    got, expected = got.cpu(), expected.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ"
    assert got.numel() == 0 or bool((got != 0).any())


def int8_spec(spec: Spec, activations: str) -> Spec:
    return replace(spec, activations=activations)
