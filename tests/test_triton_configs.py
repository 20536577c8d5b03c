# SPDX-License-Identifier: Apache-2.0
"""What is decided on the host before a Triton kernel starts: configurations, the table, the tuner's
search, the descriptor of a format, and how the package is imported. No kernel runs here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import pytest

import qkern.triton_kernels as tk
from qkern.triton_kernels import Spec, configs, excluded, plan, tune
from qkern.triton_kernels.configs import CANDIDATES, Choice, Config, Device, Table

DEVICES = (
    Device("NVIDIA A100", 80, 108, 166912),
    Device("NVIDIA RTX 4090", 89, 128, 101376),
    Device("NVIDIA H200", 90, 132, 232448),
    Device("NVIDIA B200", 100, 148, 232448),
    Device("NVIDIA RTX 5090", 120, 170, 101376),
    Device("MI300X", 0, 304, 65536),
    configs.GENERIC,
)
SPECS = (
    Spec("int", 4, 128), Spec("int", 3, 64, symmetric=False), Spec("int", 8),
    Spec("table", 4, 16, table_per="tensor"), Spec("table", 8, table_per="row"),
    Spec("int", 8, activations="int8"), Spec("int", 4, 24, activations="int8_group"),
    Spec("table", 4, table_per="row", activations="int8"),
    Spec("table", 4, table_per="row", activations="int8_group"),
    Spec("table", 3, table_per="tile", table_type="e4m3"),
    Spec("table", 3, table_per="tile", table_type="e4m3", activations="int8_group"),
)  # fmt: skip
SHAPES = ((1, 1), (64, 172), (4096, 14336), (28672, 4096), (8192, 8192))
ROWS = (1, 2, 4, 5, 8, 16, 17, 33, 64, 65, 128, 129, 4096)
EMPTY = Table()


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_whatever_is_chosen_is_a_candidate_that_fits(device: Device) -> None:
    for spec, (n, k), m, element in itertools.product(SPECS, SHAPES, ROWS, (2, 4)):
        kind = configs.loop_kind(spec, element)
        grad = "grad_f32" if element == 4 else "grad"
        chosen = [
            (grad, Choice("", configs.choose_grad(device, spec, element, m, n, k, EMPTY))),
        ]
        for invariant in (True, False):
            choice = configs.choose_linear(device, spec, element, m, n, k, invariant, EMPTY)
            chosen.append(("gemv" if choice.family == "gemv" else kind, choice))
        experts = configs.choose_grouped(device, spec, element, m, 8, n, k, EMPTY)
        assert experts.config in map(configs.for_experts, CANDIDATES[kind])
        assert configs.fits(kind, experts.config, spec, element, device, experts.split, True)
        for name, choice in chosen:
            assert choice.config in CANDIDATES[name]
            folded = choice.split if choice.family == "tile" else 1
            assert configs.fits(name, choice.config, spec, element, device, folded)


def test_what_is_excluded_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is most like it is; and every name in the list is one of a candidate."""
    tiles = [(kind, config) for kind, some in CANDIDATES.items() for config in some]
    ends = {(kind, str(config)) for kind, config in tiles}
    ends |= {(f"experts-{kind}", str(configs.for_experts(config))) for kind, config in tiles}
    for version in map(excluded.parsed, json.loads(excluded.PATH.read_text())):
        for name in itertools.chain(*excluded.of_version(version).values()):
            bare = name.removesuffix("-many")
            assert any(bare.startswith(f"{k}-") and bare.endswith(f"-{c}") for k, c in ends), name
    device, spec = Device("NVIDIA L40", 89, 142, 101376), SPECS[0]
    default = configs.default.__wrapped__  # past its cache
    first = default("dot", 64, device, spec, 2)
    assert first == Config(64, 64, 64, 4, 3)
    known = {str(device.arch): frozenset({configs.loop_name("dot", first, spec, 1)})}
    monkeypatch.setattr(excluded, "loops", lambda: known)
    assert not configs.fits("dot", first, spec, 2, device)
    assert configs.has_room("dot", first, spec, 2, device)
    assert default("dot", 64, device, spec, 2) == Config(64, 128, 64, 8, 3)
    assert default("dot", 64, device, spec, 2, split=2) == first
    known[str(device.arch)] = frozenset({configs.loop_name("dot", first, spec, 2, experts=True)})
    assert default("dot", 64, device, spec, 2, split=2) == first
    assert default("dot", 64, device, spec, 2, 2, experts=True) == Config(64, 128, 64, 8, 3)
    gemv = configs.loop_name("gemv", CANDIDATES["gemv"][2], spec, 4)
    known[str(device.arch)] = frozenset({gemv})
    assert gemv.endswith("-many") and not configs.fits(
        "gemv", CANDIDATES["gemv"][2], spec, 2, device
    )


def test_a_version_that_was_not_compiled_with_is_like_an_older_one() -> None:
    known = ((3, 10), (3, 6), (3, 9))
    for version, expected in {(3, 6): (3, 6), (3, 8): (3, 6), (3, 9): (3, 9), (4, 0): (3, 10),
                              (3, 2): (3, 6)}.items():  # fmt: skip
        assert excluded.like(version, known) == expected, version
    assert excluded.parsed("3.6.0+git1") == (3, 6)


def test_an_architecture_that_was_not_compiled_for_is_like_an_older_one() -> None:
    like = {86: "80", 87: "80", 80: "80", 89: "89", 90: "90", 103: "100", 121: "120", 0: "0",
            75: ""}  # fmt: skip
    for arch, expected in like.items():
        assert configs.compiled_like(Device("", arch, 64, 65536)) == expected, arch


def test_parts_of_k_never_depend_on_the_rows() -> None:
    for device, spec, (n, k) in itertools.product(DEVICES, SPECS, SHAPES):
        rows = (*range(1, 70), 128, 129, 5000)
        choices = [configs.choose_linear(device, spec, 2, m, n, k, tuned=EMPTY) for m in rows]
        grouped = [configs.choose_grouped(device, spec, 2, m, 8, n, k, EMPTY) for m in rows]
        assert len({c.split for c in (*choices, *grouped)}) == 1
        assert list(dict.fromkeys(c.family for c in choices)) == ["split", "tile"]
        fast = [configs.choose_linear(device, spec, 2, m, n, k, False, EMPTY) for m in rows]
        assert list(dict.fromkeys(c.family for c in fast)) == ["gemv", "split", "tile"]
        assert {c.split for c in fast if c.family == "tile"} == {1}
        assert {c.split for c in fast if c.family == "split"} == {choices[0].split}


def test_every_tile_is_made_of_the_same_instructions() -> None:
    """64 rows of the first operand, 4 warps: what Hopper's instructions need; and parts of K are
    whole steps of every tile."""
    for kind, least in (("dot", "cols"), ("grad", "rows")):
        assert all(getattr(c, least) % 64 == 0 and c.warps % 4 == 0 for c in CANDIDATES[kind])
    for kind, most in (("dot_f32", "cols"), ("grad_f32", "rows")):
        assert all(getattr(c, most) < 64 for c in CANDIDATES[kind]), "tf32 on sm_100"
    for kind in ("grad", "grad_f32"):
        assert len({c.cols for c in CANDIDATES[kind]}) == 1, "the order of the sum over outputs"
    for kind in ("dot", "dot_f32", "int8"):
        assert all(configs.STEP % c.depth == 0 for c in CANDIDATES[kind])


def test_parts_of_k_cover_every_column_once() -> None:
    for k, split, depth in itertools.product((1, 13, 128, 172, 4096, 14336), configs.SPLITS,
                                             (64, 96, 128, 512)):  # fmt: skip
        span = configs.span_of(k, split, depth)
        assert span % depth == 0 and span * split >= k
        columns = [c for p in range(split) for c in range(p * span, min((p + 1) * span, k))]
        assert columns == list(range(k))


def test_steps_of_int8_never_cross_a_chunk() -> None:
    for group, bits, config in itertools.product((None, 8, 9, 24, 32, 128, 200, 1024), (2, 3, 4, 8),
                                                 CANDIDATES["int8"]):  # fmt: skip
        for activations in ("int8", "int8_group"):
            spec = Spec("int", bits, group, activations=activations)
            c = plan.int8_constants(spec, True, config, 4096)
            assert c["BK"] & (c["BK"] - 1) == 0 and 32 <= c["BK"] <= config.depth
            assert c["CHUNK"] == (group or (128 if activations == "int8_group" else 65536))
            assert plan.step(spec) % (c["CHUNK"] if c["CHUNK"] < 65536 else c["BK"]) == 0
            if not c["ALIGNED"]:
                assert c["CHUNK"] * bits % 8 or c["CHUNK"] % 8


def test_the_shipped_table_is_valid() -> None:
    Table.read(Path(configs.__file__).with_name("configs.json"))


def test_a_measured_choice_is_used_and_a_foreign_one_refused(tmp_path: Path) -> None:
    device, spec = DEVICES[2], SPECS[0]
    table = Table()
    key = Table.key("dot", spec, 4096, 4096)
    table.put(device, key, "m16", CANDIDATES["dot"][0])
    table.put(device, key, "split", 8)
    table.put(device, key, "gemv", CANDIDATES["gemv"][1])
    path = tmp_path / "deep" / "table.json"
    table.write(path)
    again = Table.read(path)
    assert again.devices == table.devices
    chosen = configs.choose_linear(device, spec, 2, 9, 4096, 4096, tuned=again)
    assert chosen == Choice("split", CANDIDATES["dot"][0], 8)
    fast = configs.choose_linear(device, spec, 2, 1, 4096, 4096, False, again)
    assert fast.config == CANDIDATES["gemv"][1]
    for m in (1, 40, 4000):
        assert configs.choose_linear(device, spec, 2, m, 4096, 4096, tuned=again).split == 8
    other = configs.choose_linear(DEVICES[0], spec, 2, 9, 4096, 4096, tuned=again)
    assert other == configs.choose_linear(DEVICES[0], spec, 2, 9, 4096, 4096, tuned=EMPTY)
    for entry in ({"m16": [1, 2, 3, 4, 5]}, {"split": 3}, {"words": 1}, {"m16": "x"}):
        path.write_text(json.dumps({"version": 1, "devices": {"d": {"dot|a|1x1": entry}}}))
        with pytest.raises(ValueError, match=r"table\.json is not a table"):
            Table.read(path)
    path.write_text('{"version": 99, "devices": {}}')
    with pytest.raises(ValueError, match="version 99"):
        Table.read(path)


def test_tuning_saves_as_it_goes_and_resumes(tmp_path: Path) -> None:
    """A clock that prefers the last candidate, and that breaks down after some jobs."""
    device, path = DEVICES[2], tmp_path / "table.json"
    todo = list(tune.jobs(SPECS[:1], [(4096, 4096)], 2))
    lines: list[str] = []

    def run(calls_left: int) -> int:
        left = [calls_left]

        def measure(job: tune.Job, family: str, config: Config, split: int) -> float:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return 1.0 / (
                1 + max(CANDIDATES["gemv" if family == "gemv" else job.kind].index(config), split)
            )

        table = Table.read(path) if path.is_file() else Table()
        return tune.search(todo, device, table, measure, 2, lambda t: t.write(path), lines.append)

    with pytest.raises(KeyboardInterrupt):
        run(20)
    saved = Table.read(path).devices[device.name]
    assert 0 < sum(map(len, saved.values())) < len(todo)
    decided = run(10**6)
    assert decided == len(todo) - sum(map(len, saved.values()))
    assert run(0) == 0, "nothing is measured twice"
    assert any("known" in line for line in lines) and len(lines) >= 2 * len(todo)
    table = Table.read(path)
    entry = table.find(device, "dot", SPECS[0], 4096, 4096)
    assert Config(*entry["gemv"]) == CANDIDATES["gemv"][-1]
    fast = configs.choose_linear(device, SPECS[0], 2, 1, 4096, 4096, False, table)
    assert fast.config == Config(*entry["gemv"])
    for m, slot in ((1, "m16"), (4096, "m256")):
        chosen = configs.choose_linear(device, SPECS[0], 2, m, 4096, 4096, tuned=table)
        assert (chosen.config, chosen.split) == (Config(*entry[slot]), entry["split"])


def test_a_search_covers_every_candidate_that_fits() -> None:
    device = DEVICES[1]
    for job in tune.jobs(SPECS, [(4096, 4096)], 2):
        found = list(tune.trials(job, device, EMPTY, 2))
        assert found
        if job.slot.endswith("split"):
            assert [split for *_, split in found] == list(configs.SPLITS)
        elif job.slot != "gemv":
            families = {(family, split) for family, _, split in found}
            assert len(families) == 1
            folded = [split if family == "tile" else 1 for family, split in families]
            assert [c for _, c, _ in found] == [
                c
                for c in CANDIDATES[job.kind]
                if configs.fits(job.kind, c, job.spec, 2, device, *folded)
            ]


def test_tuning_times_weights_that_the_kernels_take() -> None:
    pytest.importorskip("torch")
    import qkern
    from qkern.triton_kernels.spec import check_parts

    for text in ("int4-g128", "int8", "int3-g64-asym", "nf4", "mxfp4", "nvfp4", "codebook4",
                 "codebook4-tensor-g64", "lutb", "lutb-a8g"):  # fmt: skip
        spec = Spec.from_format(qkern.parse_format(text)).of_columns(192)
        assert check_parts(spec, 192, *tune.random_parts(spec, 24, 192, "cpu"), None) == 24


def test_tuning_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--shapes", "12"]) == 2
    assert "--shapes must be like" in capsys.readouterr().err


def test_a_spec_survives_its_text_and_names_its_class() -> None:
    for spec in (*SPECS, Spec("table", 3, None, table_per="tile", table_type="e4m3"),
                 Spec("table", 4, 16, True, "tensor", 0.1, "int8_group", "e4m3")):  # fmt: skip
        assert Spec.parse(spec.text) == spec
    assert Spec("int", 4, 128, False, activations="int8").name == "int4-g128-asym-a8"
    assert Spec("table", 4, 64, table_per="tensor").name == "table4-tensor-g64"


def test_a_spec_from_a_format() -> None:
    fmt = SimpleNamespace(kind="int", bits=4, group_size=32, symmetric=False, activations="int8",
                          table_scale=1.0, table_per=None, scale_encoding=None)  # fmt: skip
    assert Spec.from_format(fmt) == Spec("int", 4, 32, False, activations="int8")
    table = SimpleNamespace(kind="table", bits=4, group_size=16, activations="float",
                            table_scale=1.0, table_per="tensor", scale_encoding="e4m3")  # fmt: skip
    expected = Spec("table", 4, 16, True, "tensor", 0.25, scale_type="e4m3")
    assert Spec.from_format(table, table_scale=0.25) == expected


@pytest.mark.parametrize("wrong,words", [
    ({"kind": "word"}, "kind must be one of"), ({"bits": 9}, "bits must be"),
    ({"group": 4}, "at least 8"), ({"activations": "int4"}, "activations must"),
    ({"table_per": "row"}, "table_per must"), ({"scale_type": "e5m2"}, "scale_type must"),
])  # fmt: skip
def test_a_wrong_spec_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Spec(**{"kind": "int", "bits": 4, **wrong})
    with pytest.raises(ValueError, match="needs a group size"):
        Spec("table", 4, table_per="group")


def test_groups_as_wide_as_a_row_are_rows() -> None:
    spec = Spec("table", 4, 64, table_per="group").of_columns(64)
    assert (spec.group, spec.table_per) == (None, "row")
    assert Spec("int", 4, 64).of_columns(65).group == 64


def test_the_folder_refuses_its_bare_name() -> None:
    folder = Path(tk.__file__).resolve().parent
    code = f"import sys; sys.path.insert(0, {str(folder.parent)!r}); import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "import qkern.triton_kernels" in done.stderr


def test_importing_is_cheap() -> None:
    """Neither triton nor torch is loaded before the first call."""
    code = "import sys, qkern.triton_kernels as t; t.unavailable(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("absent", ["torch", "triton"])
def test_an_absent_package_is_named(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == absent else real(name, *rest),
    )
    assert f"need {absent}, which is not installed" in (tk.unavailable() or "")
    # As in a process that has not used the kernels yet.
    monkeypatch.delitem(sys.modules, f"{tk.__name__}.ops", raising=False)
    monkeypatch.delattr(tk, "ops", raising=False)
    with pytest.raises(ImportError, match=absent):
        tk.quantize_activations(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("version,usable", [("3.1.0", False), ("2.9", False), ("3.2.0", True),
                                            ("4.0.0+git1", True)])  # fmt: skip
def test_an_old_triton_is_named(
    version: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = tk.unavailable()
    assert (reason is None) == usable
    if reason:
        assert "3.2 or newer" in reason and version in reason
    assert astuple(CANDIDATES["gemv"][0])
