# SPDX-License-Identifier: Apache-2.0
"""torch.export and AOTInductor: what a program computes, and what it stores."""

from __future__ import annotations

import copy
import gc
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="it is about torch programs")

import qkern  # noqa: E402
from op_samples import canonical, normal, weight  # noqa: E402
from qkern import _canonical, nn  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
K = 64


class Block(torch.nn.Module):
    """A gated block with a residual and a linear layer of each kind of weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(K, 96)
        self.gate = torch.nn.Linear(K, 96, bias=False)
        self.down = torch.nn.Linear(96, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


def block() -> Block:
    model = Block().eval().requires_grad_(False)
    formats = {"up": "int4-g32-asym", "gate": "codebook4-a8", "down": "nvfp4"}
    qkern.quantize_(model, formats, progress=False)
    return model


def export(model: torch.nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=2, max=512)
    return torch.export.export(model, (normal(3, K),), dynamic_shapes=({0: rows},), strict=strict)


@pytest.mark.parametrize("strict", (False, True))
def test_a_fresh_model_is_exported_saved_and_loaded(strict: bool, tmp_path: Path) -> None:
    model = block()
    expected = copy.deepcopy(model)
    program = export(model, strict)
    # Nothing but canonical storage and biases is in it, the model's own tensors.
    assert program.state_dict.keys() == model.state_dict().keys() and not program.constants
    assert all(torch.equal(program.state_dict[n], part) for n, part in model.state_dict().items())
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2")
    for m in (2, 3, 17):
        x = normal(m, K, seed=m)
        y = expected(x)
        for run in (program.module(), loaded.module(), model):
            assert torch.equal(run(x), y)
    size = sum(part.nbytes for part in program.state_dict.values())
    stored = sum(part.nbytes for part in loaded.state_dict.values())
    assert stored == size


@pytest.mark.parametrize("strict", (False, True))
def test_a_used_model_says_what_to_do(strict: bool) -> None:
    model, x = block(), normal(3, K)
    y = model(x)
    with pytest.raises(Exception, match=r"call qkern\.nn\.unpack_\(model\) before you export"):
        export(model, strict)
    program = export(nn.unpack_(model), strict)
    assert torch.equal(program.module()(x), y) and torch.equal(model(x), y)


def test_a_loaded_state_changes_what_a_program_computes() -> None:
    first, second = block(), block()
    second.up = nn.Linear(K, 96, format="int4-g32-asym")
    x = normal(3, K)
    run = export(first).module()
    assert torch.equal(run(x), block()(x))
    run.load_state_dict(second.state_dict())
    assert torch.equal(run(x), copy.deepcopy(second)(x))


def test_gradients_reach_the_input_of_a_program() -> None:
    model, x = block(), normal(3, K).requires_grad_()
    run = export(model).module()
    run(x).square().sum().backward()
    leaf = x.detach().clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert torch.equal(x.grad, leaf.grad)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_from_python(tmp_path: Path) -> None:
    model = block()
    package = torch._inductor.aoti_compile_and_package(
        export(model), package_path=str(tmp_path / "block.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    for m in (2, 5, 64):
        x = normal(m, K, seed=m)
        assert torch.equal(run(x), copy.deepcopy(model)(x))


# ---- the layout that the operations derive ----


def test_it_is_derived_once_and_follows_changes_in_place() -> None:
    qt, x = weight("int8"), normal(2, 75)
    arguments = list(canonical(qt))

    def run() -> torch.Tensor:
        return torch.ops.qkern.linear_canonical(x, *arguments, None)

    y = run()
    assert torch.equal(y, qkern.linear(x, weight("int8")))
    made = dict(_canonical._made)
    assert torch.equal(run(), y) and all(_canonical._made[key] is made[key] for key in made)
    arguments[1].mul_(2)  # scales
    assert torch.equal(run(), 2 * y)
    arguments[1] = arguments[1] / 2
    assert torch.equal(run(), y)
    before = len(_canonical._made)
    del qt, arguments[:]
    gc.collect()
    torch.ops.qkern.linear_canonical(x, *canonical(weight("int8")), None)
    assert len(_canonical._made) <= before


def test_bad_weights_are_answered_with_a_sentence() -> None:
    x, good = normal(2, 75), canonical(weight("int8"))
    op = torch.ops.qkern.linear_canonical
    for change, error, sentence in (
        ({0: good[0][:, 1:]}, ValueError, "codes"),
        ({0: None}, qkern.FormatError, "needs codes"),
        ({1: None}, ValueError, "scales"),
        ({6: "int9"}, qkern.FormatError, "int9"),
        ({7: 38}, ValueError, "codes"),
        ({1: good[1].double()}, (TypeError, ValueError), "float64"),
        ({1: good[1].to("meta")}, ValueError, "one device"),
    ):
        arguments = [change.get(i, value) for i, value in enumerate(good)]
        with pytest.raises(error, match=sentence):
            op(x, *arguments, None)
    with pytest.raises(ValueError, match="74"):
        op(x[:, 1:], *good, None)
