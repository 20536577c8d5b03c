# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: the same as those of the package safetensors, and no file can do harm."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="tensors are torch tensors")

from qkern.errors import QkernError  # noqa: E402
from qkern.store._folder import NewFolder  # noqa: E402
from qkern.store._safetensors import (  # noqa: E402
    DTYPES,
    ShardWriter,
    TensorFile,
    TensorFolder,
    header_bound,
)


def tensors() -> dict[str, torch.Tensor]:
    """Every dtype, with sizes that leave the next one at an odd place; empty and scalar ones."""
    found = {}
    for i, (name, size) in enumerate(DTYPES.values()):
        raw = torch.randint(0, 2 if name == "bool" else 100, (3, 5 * size), dtype=torch.uint8)
        found[f"a.{i}.{name}"] = raw.view(getattr(torch, name))
    found |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "ä.✓": torch.ones(1)}
    return found


def write(folder: Path, values: dict[str, torch.Tensor], max_bytes: int = 10**9) -> dict[str, str]:
    with NewFolder(folder, lambda name: True) as new:
        writer = ShardWriter(new, header_bound((n, t.dim()) for n, t in values.items()), max_bytes)
        for name, tensor in values.items():
            writer.add_tensor(name, tensor)
        return writer.finish()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.mark.parametrize("max_bytes", [10**9, 200, 1])
def test_what_is_written_is_read(tmp_path: Path, max_bytes: int) -> None:
    values = tensors()
    home = write(tmp_path / "out", values, max_bytes)
    assert len(set(home.values())) == {10**9: 1, 200: 5, 1: len(values) - 1}[max_bytes]
    with TensorFolder(tmp_path / "out", sorted(set(home.values()))) as found:
        assert set(found) == set(values)
        for name, tensor in values.items():
            assert same(found.read(name), tensor), name
            assert b"".join(bytes(c) for c in found.chunks(name)) == (
                tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            )


def test_the_package_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch", reason="the package safetensors")
    values = tensors()
    write(tmp_path / "out", values)
    theirs = package.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in values.items():
        assert same(theirs[name], tensor), name
    package.save_file(values, tmp_path / "theirs.safetensors", {"format": "pt"})
    with TensorFolder(tmp_path, ["theirs.safetensors"]) as found:
        assert set(found) == set(values)
        assert all(same(found.read(name), tensor) for name, tensor in values.items())


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FOUR = bytes(4)
HOSTILE = {
    "nothing": (b"", "fewer than 8"),
    "cut length": (b"\x01\x00", "fewer than 8"),
    "huge header": (raw({}, length=2**63), "no whole safetensors file"),
    "header past the end": (raw({}, length=3), "no whole safetensors file"),
    "no JSON": (raw(b"{nonsense"), "cannot be read"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "cannot be read"),
    "deep": (raw(b"[" * 100_000), "cannot be read"),
    "no object": (raw([1]), "JSON object"),
    "twice": (raw(b'{"a": 1, "a": 2}'), "a key is there twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "names to texts"),
    "no entry": (raw({"a": 3}), "lacks a dtype"),
    "no shape": (raw({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, FOUR), "lacks a dtype"),
    "three offsets": (raw({"a": entry(offsets=(0, 2, 4))}, FOUR), "lacks a dtype"),
    "dtype": (raw({"a": entry("U7")}, FOUR), "not known here"),
    "dtype is a list": (raw({"a": entry(["U8"])}, FOUR), "not known here"),
    "negative": (raw({"a": entry(shape=(-4,))}, FOUR), "at least 0"),
    "float": (raw({"a": entry(shape=(4.0,))}, FOUR), "at least 0"),
    "true": (raw({"a": entry(shape=(True, 4))}, FOUR), "at least 0"),
    "wrong size": (raw({"a": entry("F32")}, FOUR), "takes 16 bytes"),
    "overflow": (raw({"a": entry("F64", (2**32, 2**32))}, FOUR), "but its offsets span 4"),
    "turned": (raw({"a": entry(offsets=(4, 0))}, FOUR), "span -4"),
    "gap": (raw({"a": entry(offsets=(1, 5))}, bytes(5)), "nor leave gaps"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(2, 6))}, bytes(6)), "neither overlap"),
    "cut": (raw({"a": entry()}, bytes(3)), "it was cut"),
    "appended": (raw({"a": entry()}, bytes(5)), "something was appended"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_file_is_a_sentence(tmp_path: Path, case: str) -> None:
    data, sentence = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(QkernError, match=sentence):
        TensorFile(path)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """1,000 seeded mutations: an error of ours, or tensors of the size that the header states."""
    values = {"a": torch.arange(6.0).view(2, 3), "b.codes": torch.arange(5, dtype=torch.uint8)}
    write(tmp_path / "out", values)
    good = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = int.from_bytes(good[:8], "little")
    dice = random.Random(0)
    path = tmp_path / "mutated"
    refused = 0
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(8 + header if dice.random() < 0.9 else len(data))
            how = dice.randrange(3)
            if how == 0:
                data[place] = dice.choice(b'0123456789[]{},:"-eU8F32 \xff') % 256
            elif how == 1:
                del data[place : place + dice.randint(1, 8)]
            else:
                data[place:place] = bytes(dice.choices(b"0129,[]", k=dice.randint(1, 4)))
        path.write_bytes(data)
        try:
            with TensorFolder(tmp_path, ["mutated"]) as found:
                for name in found:
                    tensor = found.read(name)
                    assert tensor.nbytes == found[name].nbytes <= len(data)
        except QkernError:
            refused += 1
    assert 300 < refused < 1000


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "out", {"a": torch.ones(100)})
    path = tmp_path / "out" / "model.safetensors"
    with TensorFolder(path.parent, [path.name]) as found:
        path.open("r+b").truncate(path.stat().st_size - 4)
        with pytest.raises(QkernError, match="ended within the tensor a"):
            found.read("a")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", ".", "..", "a\0b"])
def test_files_are_those_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(QkernError, match="not the plain name of a file"):
        TensorFolder(tmp_path, [name])


def test_two_files_with_one_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(raw({"x": entry()}, FOUR))
    with pytest.raises(QkernError, match="in both a and b"):
        TensorFolder(tmp_path, ["a", "b"])
