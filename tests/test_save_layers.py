# SPDX-License-Identifier: Apache-2.0
"""Saving and loading modules beyond Linear: the same state, the same results, ties that hold."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="modules are torch modules")
pytest.importorskip("safetensors", reason="folders hold safetensors")

import qkern  # noqa: E402
from qkern import nn  # noqa: E402


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(20, 16, padding_idx=1)
        self.conv = torch.nn.Conv1d(16, 16, 3, padding="same", groups=2, padding_mode="reflect")
        self.image = torch.nn.Conv2d(1, 4, (2, 3), stride=(1, 2))
        self.lm_head = torch.nn.Linear(16, 20)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        return self.lm_head(self.conv(x.transpose(1, 2)).transpose(1, 2)), self.image(x[:, None])


IDS = torch.arange(12).view(2, 6)


@torch.no_grad()
@pytest.mark.parametrize("called", (False, True))
def test_convolutions_and_tied_weights(tmp_path: Path, called: bool) -> None:
    model = Model().eval()
    qkern.quantize_(model, {"image": "int8-a8", "*": "int4-g8"}, skip=(), progress=False)
    y = copy.deepcopy(model)(IDS)
    if called:
        model(IDS)
    qkern.save(model, tmp_path / "m")
    loaded = qkern.load(Model().eval(), tmp_path / "m")
    assert type(loaded.conv) is nn.Conv1d and type(loaded.image) is nn.Conv2d
    assert loaded.lm_head.is_tied_to(loaded.embed)
    assert repr(loaded) == repr(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded(IDS), y, strict=True))
    assert loaded.lm_head.packed is loaded.embed.packed


@torch.no_grad()
def test_experts(tmp_path: Path) -> None:
    experts = nn.Experts(
        nn.GroupedLinear.from_stack(torch.randn(3, 12, 16), "codebook4"),
        nn.GroupedLinear.from_stack(torch.randn(3, 16, 6), "codebook4-tensor"),
        torch.nn.SiLU(),
    )
    arguments = torch.randn(4, 16), torch.tensor([[0, 2]] * 4), torch.rand(4, 2)
    y = experts(*arguments)
    qkern.save(torch.nn.Sequential(experts), tmp_path / "m")
    loaded = qkern.load(torch.nn.Sequential(torch.nn.Identity()), tmp_path / "m")
    assert torch.equal(loaded[0](*arguments), y)
