# SPDX-License-Identifier: Apache-2.0
"""quantize_: what is replaced, what is left alone and why, and that failure leaves no trace."""

from __future__ import annotations

import copy
import json

import pytest

torch = pytest.importorskip("torch", reason="models are torch modules")

import qkern  # noqa: E402
from qkern import nn  # noqa: E402

W = 64


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(W)
        self.up = torch.nn.Linear(W, 2 * W)
        self.down = torch.nn.Linear(2 * W, W, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, W)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(W, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


IDS = torch.arange(14).view(2, 7)
LAYERS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]


def quantized_names(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.QuantizedModule)]


def snapshot(model: torch.nn.Module) -> dict[str, int]:
    return {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}


@torch.no_grad()
def test_the_model_computes_with_the_quantized_weights() -> None:
    model = Model()
    reference = copy.deepcopy(model)
    report = qkern.quantize_(model, "int8", progress=False)
    assert quantized_names(model) == LAYERS
    for name in LAYERS:
        layer = model.get_submodule(name)
        weight = reference.get_submodule(name).weight
        error = (layer.weight.dequantize() - weight).norm() / weight.norm()
        assert report[name].error == pytest.approx(float(error), rel=1e-5)
        weight.copy_(layer.weight.dequantize())
    # Both have the same weights now and add in different orders: K + 8 roundings per layer.
    difference = (model(IDS) - reference(IDS)).abs().max()
    assert difference <= 4 * (2 * W + 8) * 2.0**-24 * reference(IDS).abs().max() * W


def test_the_report_names_every_module_its_bytes_and_the_reason() -> None:
    model = Model()
    before = sum(p.numel() * 4 for p in model.parameters())
    report = qkern.quantize_(model, qkern.Int(4, 32), progress=False)
    assert [row.name for row in report] == [
        "embed", "blocks.0.norm", "blocks.0.up", "blocks.0.down",
        "blocks.1.norm", "blocks.1.up", "blocks.1.down", "lm_head",
    ]  # fmt: skip
    assert [row.name for row in report.quantized] == LAYERS and report.quantized_count == 4
    up = report["blocks.0.up"]
    weight = 2 * W * W // 2 + 2 * W * (W // 32) * 2  # codes and float16 scales
    assert (up.kind, up.format) == ("Linear", "int4-g32")
    assert (up.old_bytes, up.new_bytes) == (4 * (2 * W * W + 2 * W), weight + 4 * 2 * W)
    assert (up.weights, up.weight_bytes) == (2 * W * W, weight)
    assert report.bits_per_weight == 4.5
    assert report.old_bytes == before
    assert report.new_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert report["lm_head"].reason == "skipped by name ('lm_head')"
    assert "an embedding is quantized where a pattern names it" in report["embed"].reason
    assert report["blocks.0.norm"].reason == "no quantized LayerNorm is known"
    text = str(report)
    for row in report:
        line = next(line for line in text.splitlines() if line.startswith(row.name + " "))
        assert row.kind in line and (row.reason or row.format) in line
    assert "4 modules quantized (4.50 bits per weight), 4 left alone" in text.splitlines()[-1]
    assert json.loads(json.dumps(report.to_dict()))["modules"][2]["name"] == "blocks.0.up"


def test_patterns_choose_the_format_and_the_first_match_counts() -> None:
    model = Model()
    report = qkern.quantize_(
        model,
        {"blocks.0.*": "int4-g64", "up": None, "*.down": "nf4", "lm_head": "int8"},
        skip=(),
        progress=False,
    )
    assert {row.name: row.format for row in report.quantized} == {
        "blocks.0.up": "int4-g64",
        "blocks.0.down": "int4-g64",
        "blocks.1.down": "nf4",
        "lm_head": "int8",
    }
    assert report["blocks.1.up"].reason == "left alone by the pattern 'up'"
    report = qkern.quantize_(Model(), {"nothing": "int8"}, skip=("up",), progress=False)
    assert report["blocks.0.up"].reason == "skipped by name ('up')"
    assert report["blocks.0.down"].reason == "no pattern matches its name"


def test_tied_weights_stay_tied() -> None:
    model = Model()
    model.lm_head.weight = model.embed.weight
    model.a = torch.nn.Linear(W, W, bias=False)
    model.b = torch.nn.Linear(W, W, bias=False)
    model.b.weight = model.a.weight
    model.again = model.blocks[0].up
    report = qkern.quantize_(model, "int8", skip=(), progress=False)
    assert report["lm_head"].reason == "one weight with embed"
    assert model.lm_head.is_tied_to(model.embed) and model.lm_head.codes is model.embed.codes
    assert model.a is model.b and report["b"].reason == "one module with a"
    assert report["b"].new_bytes == report["b"].old_bytes == 0
    assert model.again is model.blocks[0].up and isinstance(model.again, nn.Linear)
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert report.new_bytes == sum(tensors.values())


def test_embeddings_are_quantized_where_a_pattern_names_them() -> None:
    model = Model()
    reference = copy.deepcopy(model)
    report = qkern.quantize_(model, {"emb*": "int8-a8", "*": "int4"}, strict=True, progress=False)
    assert report["embed"].format == "int8-a8" and report["embed"].weights == 50 * W
    weight = qkern.quantize(reference.embed.weight.detach(), "int8").dequantize()
    assert torch.equal(model.embed(IDS), weight[IDS])
    twins = torch.nn.ModuleDict({n: torch.nn.Embedding(9, W) for n in ("a", "b")})
    twins["b"].weight = twins["a"].weight  # tied to each other, to nothing that is quantized
    report = qkern.quantize_(twins, "int8", strict=True, progress=False)
    assert report.quantized_count == 0 and report["a"].reason == report["b"].reason
    report = qkern.quantize_(twins, {"a": "int8", "b": "int8"}, strict=True, progress=False)
    assert report["b"].reason == "one weight with a" and twins["a"].is_tied_to(twins["b"])


def test_layers_with_biases_of_their_own_share_a_weight() -> None:
    model = torch.nn.ModuleDict({n: torch.nn.Linear(W, W) for n in ("a", "b")})
    model["b"].weight = model["a"].weight
    x = torch.randn(3, W, generator=torch.Generator().manual_seed(0))
    report = qkern.quantize_(model, "int8", progress=False)
    assert report["b"].reason == "one weight with a" and model["a"] is not model["b"]
    assert model["b"].is_tied_to(model["a"])
    for layer in model.values():
        assert torch.equal(layer(x), qkern.linear(x, model["a"].weight, layer.bias))
    assert model["a"].packed is model["b"].packed


def test_ties_that_cannot_hold_leave_all_alone() -> None:
    model = torch.nn.ModuleDict({n: torch.nn.Linear(W, W) for n in ("a", "b", "c", "skip")})

    class OtherLinear(torch.nn.Linear):
        pass

    model["b"] = OtherLinear(W, W)
    model["b"].weight = model["a"].weight  # another use of it
    model["skip"].weight = model["c"].weight
    report = qkern.quantize_(model, "int8", skip=("skip",), progress=False)
    assert quantized_names(model) == []
    assert report["a"].reason == "its weight is tied to b (OtherLinear)"
    assert "is a subclass of Linear" in report["b"].reason
    assert report["c"].reason == "its weight is tied to skip (Linear)"
    assert report["skip"].reason == "skipped by name ('skip')"


def test_what_a_replacement_would_break_is_left_alone() -> None:
    model = Model()
    model.attention = torch.nn.MultiheadAttention(W, 4)
    model.hooked = torch.nn.Linear(W, W)
    model.hooked.register_forward_hook(lambda *_: None)
    model.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(W, W))
    model.old_normed = torch.nn.Linear(W, W)
    model.old_normed.extra = torch.nn.Parameter(torch.zeros(1))
    model.empty = torch.nn.Linear(W, W, device="meta")
    report = qkern.quantize_(model, "int8", progress=False)
    assert quantized_names(model) == LAYERS
    assert "is a subclass of Linear" in report["attention.out_proj"].reason
    assert report["hooked"].reason == "it has hooks, which a replacement would lose"
    assert "is a subclass of Linear" in report["normed"].reason
    assert report["old_normed"].reason == "its weight is computed from other parameters"
    assert report["empty"].reason == "its weight is on the meta device and has no numbers"
    again = qkern.quantize_(model, "int4", progress=False)
    assert again.quantized_count == 0
    assert again["blocks.0.up"].reason == "it is quantized already (int8)"


@torch.no_grad()
def test_torchs_own_transformer_layer_runs() -> None:
    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(W, 4, 2 * W, batch_first=True), 2
    ).eval()
    x = torch.randn(2, 5, W, generator=torch.Generator().manual_seed(0))
    expected = encoder(x)
    report = qkern.quantize_(encoder, "int8", progress=False)
    assert report.quantized_count == 4
    # Outputs are normalized, so that changes of 0.4 % in the weights stay of that order.
    assert (encoder(x) - expected).abs().max() < 0.05


def test_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    model.blocks[1].up.weight.data[3, 4] = float("nan")
    before = snapshot(model)
    with pytest.raises(qkern.UnsupportedError, match=r"blocks\.1\.up: .*\[3, 4\] is nan"):
        qkern.quantize_(model, "int8", strict=True, progress=False)
    with pytest.raises(qkern.UnsupportedError, match="norm: no quantized LayerNorm is known"):
        qkern.quantize_(model, {"blocks.0.norm": "int8"}, strict=True, progress=False)
    with pytest.raises(qkern.UnsupportedError, match=r"pattern 'layers\.\*' matches no module"):
        qkern.quantize_(model, {"layers.*": "int8"}, strict=True, progress=False)
    calls = []

    def interrupted(module: torch.nn.Module, fmt: object, **options: object) -> None:
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(module, fmt, **options)

    original = nn.Linear.from_float
    monkeypatch.setattr(nn.Linear, "from_float", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qkern.quantize_(model, "int8", progress=False)
    assert len(calls) == 3 and snapshot(model) == before
    monkeypatch.undo()
    report = qkern.quantize_(model, "int8", progress=False)
    assert "must be finite" in report["blocks.1.up"].reason
    assert quantized_names(model) == [name for name in LAYERS if name != "blocks.1.up"]


def test_strict_asks_only_for_what_was_meant() -> None:
    assert qkern.quantize_(Model(), "int8", strict=True, progress=False).quantized_count == 4
    model = Model()
    qkern.quantize_(model, {"up": "int8"}, strict=True, progress=False)
    qkern.quantize_(model, {"*": "int4"}, strict=True, progress=False)
    assert model.blocks[0].up.format == qkern.Int(8) and model.blocks[0].down.format == qkern.Int(4)


def test_train_and_eval_mode_are_kept() -> None:
    model = Model().eval()
    qkern.quantize_(model, "int8", progress=False)
    assert not any(m.training for m in model.modules())


def test_bad_arguments_are_answered_with_a_sentence() -> None:
    for error, sentence, arguments, options in (
        (TypeError, "model must be a torch.nn.Module", (3, "int8"), {}),
        (ValueError, "itself is a Linear, .* qkern.nn.Linear.from_float",
         (torch.nn.Linear(2, 2), "int8"), {}),
        (qkern.FormatError, "'nf5' is not a format", (Model(), "nf5"), {}),
        (qkern.FormatError, "'nf5' is not a format", (Model(), {"up": "nf5"}), {}),
        (TypeError, "skip must be a sequence", (Model(), "int8"), {"skip": "up"}),
        (qkern.UnsupportedError, "no method 'magic'", (Model(), "int8"), {"method": "magic"}),
        (qkern.UnsupportedError, "takes no calibration", (Model(), "int8"), {"calibration": [1]}),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            qkern.quantize_(*arguments, **options, progress=False)


# ---- models of several kinds of layers ----


@torch.no_grad()
def test_a_convolutional_net() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3, 2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(12, 12, 3, padding="same", groups=12),
        torch.nn.BatchNorm2d(12),
        torch.nn.Conv2d(12, 40, 1, bias=False),
        torch.nn.Flatten(2),
        torch.nn.Conv1d(40, 8, 3, padding_mode="reflect", padding=1),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 25, 10),
    ).eval()
    reference = copy.deepcopy(model)
    report = qkern.quantize_(model, "int8", strict=True, progress=False)
    assert [row.kind for row in report.quantized] == [
        "Conv2d", "Conv2d", "Conv2d", "Conv1d", "Linear"
    ]  # fmt: skip
    assert report["2"].weights == 12 * 9
    for name in ("0", "2", "4", "6", "8"):
        weight = reference.get_submodule(name).weight
        weight.copy_(model.get_submodule(name).weight.dequantize().view_as(weight))
    x = torch.randn(2, 3, 9, 10, generator=torch.Generator().manual_seed(1))
    # The same weights; at most 200 products per sum in another order, through 6 layers.
    assert (model(x) - reference(x)).abs().max() <= 6 * 200 * 2.0**-23 * reference(x).abs().max()


@torch.no_grad()
def test_gpt2_with_its_transposed_linear_layers() -> None:
    transformers = pytest.importorskip("transformers", reason="GPT-2 is theirs")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    reference = copy.deepcopy(model)
    report = qkern.quantize_(model, "int4-g32", skip=(), progress=False)
    row = report["transformer.h.0.attn.c_attn"]
    layer = model.transformer.h[0].attn.c_attn
    assert (row.kind, row.format, type(layer)) == ("Conv1D", "int4-g32", nn.Linear)
    assert (layer.in_features, layer.out_features) == (32, 96)
    old = reference.transformer.h[0].attn.c_attn
    qt = qkern.quantize(old.weight.detach().t(), "int4-g32")
    assert torch.equal(layer.codes, qt.codes) and torch.equal(layer.bias, old.bias)
    assert type(layer.dequantize()) is torch.nn.Linear
    assert model.lm_head.is_tied_to(model.transformer.wte)
    assert report["lm_head"].reason == "one weight with transformer.wte"
    for name, module in reference.named_modules():
        new = model.get_submodule(name)
        if isinstance(new, nn.QuantizedModule):
            dense = new.weight.dequantize()
            module.weight.copy_(dense.t() if type(module).__name__ == "Conv1D" else dense)
    ids = torch.arange(12).view(1, 12)
    expected = reference(ids).logits
    # The same weights; sums of at most 128 products in another order, through 17 layers.
    limit = 17 * 136 * 2.0**-23 * expected.abs().max()
    assert (model(ids).logits - expected).abs().max() <= limit
