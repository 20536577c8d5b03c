# SPDX-License-Identifier: Apache-2.0
"""qkern.nn.Embedding, and weights that two modules share."""

from __future__ import annotations

import copy
import io
import pickle
import weakref

import pytest

torch = pytest.importorskip("torch", reason="modules are torch modules")

import qkern  # noqa: E402
from qkern import nn  # noqa: E402

FORMATS = ("int4-g32", "int8-a8", "codebook4", "nf4-a8g", "int4-g32-asym", "nvfp4", "mxfp4")
N, K = 45, 70


def float_table(dtype: torch.dtype = torch.float32, padding_idx: int | None = 3):
    torch.manual_seed(0)
    return torch.nn.Embedding(N, K, padding_idx, dtype=dtype)


def equal_states(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


IDS = torch.tensor([[0, 3, 44], [7, 7, 1]])


@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_are_those_of_the_weight(fmt: str, isa: str) -> None:
    table = nn.Embedding.from_float(float_table(), fmt)
    dense = table.weight.dequantize()
    assert torch.equal(table(IDS), dense[IDS])
    assert torch.equal(table(IDS), qkern.embedding(IDS, table.weight))
    for dtype in (torch.float16, torch.bfloat16):
        table.to(dtype)
        assert torch.equal(table(IDS.int()), dense[IDS].to(dtype))
    for shape in ((), (0,), (2, 0)):
        ids = torch.zeros(shape, dtype=torch.int64)
        assert torch.equal(table(ids), dense[ids].bfloat16())


@pytest.mark.parametrize("fmt", ["int8", "nf4", "nvfp4", "codebook4", "lutb"])
def test_rows_are_read_where_they_lie(fmt: str) -> None:
    """Canonical storage stays the only copy, but for LUT-B, whose tables are stored as bytes; a
    weight that is packed already is read as it is; and the bits are the same."""
    table = torch.randn(40, 192)
    module = qkern.nn.Embedding.from_float(torch.nn.Embedding.from_pretrained(table), fmt)
    ids = torch.tensor([[3, 39], [0, 3]])
    rows = module(ids)
    assert (module._buffers["packed"] is None) == (fmt != "lutb")
    weight = qkern.quantize(table, fmt)
    assert torch.equal(qkern.embedding(ids, weight), rows)
    assert weight.is_packed == (fmt == "lutb")
    assert torch.equal(qkern.embedding(ids, weight.pack_()), rows) and weight.is_packed
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(module.to(dtype)(ids), rows.to(dtype))


def test_rows_follow_what_happens_to_the_table() -> None:
    module = qkern.nn.Embedding.from_float(torch.nn.Embedding(40, 64), "int8")
    ids = torch.arange(40)
    before = module(ids)
    module.scales.mul_(2)
    assert torch.equal(module(ids), 2 * before)
    module.codes = torch.full_like(module.codes, 128)
    assert torch.equal(module(ids), torch.zeros_like(before))
    kept = [weakref.ref(part) for part in (module.codes, module.scales)]
    del module
    assert not any(part() is not None for part in kept)


def test_a_permutation_of_the_columns() -> None:
    qt = qkern.quantize(float_table().weight.detach(), "int4-g32")
    perm = torch.randperm(K, generator=torch.Generator().manual_seed(1)).int()
    qt = qkern.QuantizedTensor.from_parts(qt.format, qt.shape, **qt.parts(), perm=perm)
    plain = qkern.quantize(float_table().weight.detach(), "int4-g32").dequantize()
    expected = torch.empty_like(plain)
    expected[:, perm.long()] = plain
    assert torch.equal(nn.Embedding.from_weight(qt)(IDS), expected[IDS])


def test_the_constructor_is_torchs_with_a_format() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(N, K, 3, dtype=torch.float16, format="int8")
    source = nn.Embedding.from_float(float_table(torch.float16), "int8")
    assert equal_states(table.state_dict(), source.state_dict())
    assert (table.padding_idx, table.compute_dtype) == (3, torch.float16)
    assert nn.Embedding(N, K, -1, format="int8").padding_idx == N - 1
    assert "45, 70, padding_idx=3, format=int8, bits=8, group=row" in repr(table)
    assert nn.Embedding(N, K, device="meta", format="int8")(IDS.to("meta")).shape == (2, 3, K)


def test_dequantize_gives_the_float_table_back() -> None:
    table = nn.Embedding.from_float(float_table(torch.bfloat16).eval(), "int4-g32")
    back = table.dequantize()
    assert type(back) is torch.nn.Embedding and back.padding_idx == 3 and not back.training
    assert torch.equal(back(IDS), table(IDS)) and back.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("fmt", FORMATS)
def test_config_and_state_dict_make_it_again(fmt: str) -> None:
    table = nn.Embedding.from_float(float_table(), fmt)
    before, y = copy.deepcopy(table.state_dict()), table(IDS)
    assert equal_states(before, table.state_dict()) and "packed" not in before
    again = nn.Embedding.from_config(table.config())
    assert again.codes.is_meta
    again.load_state_dict(before, strict=True, assign=True)
    assert torch.equal(again(IDS), y) and again.padding_idx == 3
    assert torch.equal(copy.deepcopy(table)(IDS), y)


def test_bad_input_is_answered_with_a_sentence() -> None:
    table = nn.Embedding.from_float(float_table(), "int8")
    for error, sentence, call in (
        (ValueError, "row index 45 at place 1 is not in 0..44",
         lambda: table(torch.tensor([0, N]))),
        (ValueError, "row index -1", lambda: table(torch.tensor([-1]))),
        (TypeError, "ids must be int64 or int32, but they are float32", lambda: table(IDS.float())),
        (TypeError, "A torch.nn.Embedding was expected",
         lambda: nn.Embedding.from_float(torch.nn.Linear(2, 2), "int8")),
        (qkern.UnsupportedError, "max_norm=1.0 renormalizes rows",
         lambda: nn.Embedding(4, 8, max_norm=1.0, format="int8")),
        (qkern.UnsupportedError, "sparse=True is about the gradient",
         lambda: nn.Embedding.from_float(torch.nn.Embedding(4, 8, sparse=True), "int8")),
        (qkern.UnsupportedError, "scale_grad_by_freq=True",
         lambda: nn.Embedding(4, 8, scale_grad_by_freq=True, format="int8")),
        (ValueError, "padding_idx must be within",
         lambda: nn.Embedding.from_weight(table.weight, N)),
    ):  # fmt: skip
        with pytest.raises(error, match=sentence):
            call()


# ---- one weight in two modules ----


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(N, K)
        self.middle = torch.nn.Linear(K, K)
        self.lm_head = torch.nn.Linear(K, N)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.middle(self.embed(ids)))


def quantized() -> Tied:
    model = Tied().eval().requires_grad_(False)
    qkern.quantize_(model, "int4-g32", skip=(), progress=False)
    return model


def bytes_of(model: torch.nn.Module) -> int:
    return sum(t.nbytes for t in {id(b): b for b in model.buffers()}.values())


def test_both_have_one_weight_before_and_after_packing() -> None:
    model = Tied()
    report = qkern.quantize_(model, "int4-g32", skip=(), progress=False)
    assert type(model.embed) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert model.lm_head.is_tied_to(model.embed)
    assert report["lm_head"].reason == "one weight with embed"
    assert report["lm_head"].format == "int4-g32" and report["lm_head"].weights == 0
    assert report["lm_head"].new_bytes == model.lm_head.bias.nbytes
    assert model.embed.codes is model.lm_head.codes
    canonical = bytes_of(model)
    assert report.new_bytes == canonical + sum(p.nbytes for p in model.parameters())
    dense = model.embed.weight.dequantize()
    y = model(IDS)
    assert model.embed.packed is model.lm_head.packed is not None
    assert torch.equal(model.embed(IDS), dense[IDS])
    x = torch.randn(3, K)
    qt = qkern.quantize(Tied().embed.weight.detach(), "int4-g32")
    assert torch.equal(model.lm_head(x), qkern.linear(x, qt, model.lm_head.bias.detach()))
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("called", (False, True))
def test_the_state_dict_has_each_part_once(called: bool) -> None:
    model = quantized()
    if called:
        model(IDS)
    state = model.state_dict()
    assert state["embed.codes"].data_ptr() == state["lm_head.codes"].data_ptr()
    other = quantized()
    other.embed.scales = other.embed.scales * 2
    assert not torch.equal(other(IDS), model(IDS))
    for assign in (False, True):
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert other.embed.is_tied_to(other.lm_head)
        assert torch.equal(other(IDS), model(IDS))
    # What is changed in place is not given out as the weight.
    y = model(IDS)
    model.state_dict()["embed.codes"].zero_()
    state["embed.scales"].zero_()
    assert model.state_dict()["lm_head.scales"].count_nonzero() or not called
    assert torch.equal(model(IDS), y) or not called


@pytest.mark.parametrize("called", (False, True))
@pytest.mark.parametrize("how", ("deepcopy", "pickle", "save"))
def test_copies_stay_tied(called: bool, how: str) -> None:
    model = quantized()
    y = copy.deepcopy(model)(IDS)
    if called:
        model(IDS)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.embed.is_tied_to(twin.lm_head) and not twin.embed.is_tied_to(model.embed)
    assert twin.embed.codes.data_ptr() != model.embed.codes.data_ptr()
    assert twin.embed._buffers is twin.lm_head._buffers
    assert torch.equal(twin(IDS), y) and twin.embed.packed is twin.lm_head.packed


def test_moves_keep_the_tie() -> None:
    model = quantized()
    y, state = model(IDS), copy.deepcopy(model.state_dict())
    model.half().float()
    assert model.embed.is_tied_to(model.lm_head)
    model.middle.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("middle.")})
    model.lm_head.bias.copy_(state["lm_head.bias"])
    assert torch.equal(model(IDS), y)
    model.to("meta")
    assert model.embed.codes is model.lm_head.codes and model.embed.codes.is_meta
    model.to_empty(device="cpu").load_state_dict(state)
    assert model.embed.packed is None and torch.equal(model(IDS), y)
    model.share_memory()
    assert model.embed._buffers is model.lm_head._buffers
    assert torch.equal(model(IDS), y)


def test_a_new_part_is_a_new_part_for_both() -> None:
    model = quantized()
    x = torch.randn(2, K)
    before = model.lm_head(x) - model.lm_head.bias
    model.embed.scales = model.embed.scales * 2
    assert torch.equal(model.lm_head.scales, model.embed.scales)
    # Doubling is exact; the bias is added and taken away again with a rounding each.
    after = model.lm_head(x) - model.lm_head.bias
    assert torch.allclose(after, 2 * before, rtol=2**-20, atol=2**-20)


def test_what_does_not_match_cannot_be_tied() -> None:
    a, b = nn.Embedding(N, K, format="int8"), nn.Linear(K, N, format="int4")
    with pytest.raises(ValueError, match=r"int8 \(45, 70\) cannot be tied|int4 .* cannot be tied"):
        b.tie_(a)


def test_the_default_skip_leaves_the_pair_alone() -> None:
    model = Tied()
    report = qkern.quantize_(model, "int8", strict=True, progress=False)
    assert model.embed.weight is model.lm_head.weight
    assert report["embed"].reason == "its weight is tied to lm_head (Linear)"
    assert report["lm_head"].reason == "skipped by name ('lm_head')"
    assert report["middle"].format == "int8"
    with pytest.raises(qkern.UnsupportedError, match="embed: its weight is tied to lm_head"):
        qkern.quantize_(Tied(), {"embed": "int8"}, strict=True, progress=False)


def test_two_formats_leave_the_pair_alone() -> None:
    model = Tied()
    report = qkern.quantize_(
        model, {"embed": "int8", "lm_head": "int4", "*": "int4"}, skip=(), progress=False
    )
    assert model.embed.weight is model.lm_head.weight
    assert report["embed"].reason == "its weight is tied to lm_head (Linear)"
    assert report["lm_head"].reason == "its weight is tied to embed (Embedding)"


@torch.no_grad()
def test_a_tied_language_model() -> None:
    transformers = pytest.importorskip("transformers", reason="a Llama with tied embeddings")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    reference = copy.deepcopy(model)
    qkern.quantize_(model, "int8", skip=(), progress=False)
    assert model.lm_head.is_tied_to(model.model.embed_tokens)
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedModule):
            reference.get_submodule(name).weight.copy_(module.weight.dequantize())
    ids = torch.arange(12).view(1, 12)
    expected = reference(ids).logits
    # Same weights; sums of at most 48 products in another order, through 8 layers.
    limit = 8 * 56 * 2.0**-23 * expected.abs().max()
    assert (model(ids).logits - expected).abs().max() <= limit
