# SPDX-License-Identifier: Apache-2.0
"""torch's checks of every operation, and torch.compile of whole blocks."""

from __future__ import annotations

import importlib

import pytest

torch = pytest.importorskip("torch", reason="the operations are on torch tensors")

import qkern  # noqa: E402
from op_samples import SAMPLES, normal  # noqa: E402


def operations() -> list[str]:
    """Every operation of qkern that torch knows."""
    for module in ("qkern.ops", "qkern.nn"):
        importlib.import_module(module)
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("qkern::") for name in names if name.startswith("qkern::"))


@pytest.mark.parametrize("name", operations())
def test_opcheck(name: str) -> None:
    assert name in SAMPLES, f"tests/op_samples.py has no arguments for torch.ops.qkern.{name}"
    op = getattr(torch.ops.qkern, name).default
    for arguments in SAMPLES[name]():
        report = torch.library.opcheck(op, arguments)
        assert list(report.values()) == ["SUCCESS"] * 4, report


def test_every_sample_has_its_operation() -> None:
    assert set(SAMPLES) == set(operations())


# ---- whole blocks ----


def llama() -> torch.nn.Module:
    """Two layers of a Llama with every linear layer quantized, from its configuration."""
    transformers = pytest.importorskip("transformers", reason="it makes the model")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    formats = {"q_proj": "int4-g32-asym-a8g", "down_proj": "codebook4", "*": "int4-g32"}
    report = qkern.quantize_(model, formats, progress=False)
    assert len([row for row in report.to_dict()["modules"] if row["format"]]) == 14
    return model


def operations_of(graph: torch.fx.GraphModule) -> int:
    return sum("call" in node.op for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_a_compiled_block_takes_any_number_of_rows_without_a_second_compilation(
    backend: str,
) -> None:
    """aot_eager runs the same operations as eager mode, so the bits are the same. Inductor writes
    its own code for norms and the softmax, whose roundings differ: what it gives must be as near
    as that of the model with the float layers (dequantized, compiled) is to its eager run."""
    torch._dynamo.reset()
    layer = llama().model.layers[0]
    size, heads = 48, 12
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    after_the_first = 0
    with torch.no_grad():
        for rows in (7, 2, 3, 16, 33):
            x = normal(1, rows, size)
            angles = normal(1, rows, heads, seed=2)
            arguments = {"position_embeddings": (angles.cos(), angles.sin())}
            y, expected = compiled(x, **arguments), layer(x, **arguments)
            after_the_first = after_the_first or counter.frame_count
            y = y[0] if isinstance(y, tuple) else y
            expected = expected[0] if isinstance(expected, tuple) else expected
            assert y.shape == x.shape
            if backend == "aot_eager":
                assert torch.equal(y, expected)
            else:
                # One step of an int8 activation (1/127 of its largest) may round the other way.
                assert (y - expected).abs().max() <= expected.abs().max() / 127
    # The function around the layer, which transformers adds, is a graph without operations.
    assert [n > 0 for n in map(operations_of, counter.graphs)].count(True) == 1
    assert counter.frame_count == after_the_first
    assert layer.self_attn.q_proj.packed is not None
