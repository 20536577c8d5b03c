# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the demo runs a torch model")
transformers = pytest.importorskip("transformers", reason="the demo loads a transformers model")

import qkern  # noqa: E402
from qkern.cli import demo, main  # noqa: E402


def output_of(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_info_names_what_is_active(capsys: pytest.CaptureFixture) -> None:
    told = json.loads(output_of(capsys, "info", "--json", "--kernels"))
    assert told["cpu"]["isa"] == qkern.info()["cpu"]["isa"]
    assert {row["name"] for row in told["kernels"]} >= {"linear_any_a32_scalar"}
    assert "linear_any_a32_scalar" in output_of(capsys, "info", "--kernels")


def test_demo_of_the_packaged_model(capsys: pytest.CaptureFixture) -> None:
    """Every quantized row is smaller, keeps the meaning, and names the kernels that ran. Speed is
    printed, not asserted."""
    try:
        demo.packaged_model()
    except ImportError as error:
        pytest.skip(str(error))
    argv = ["demo", "--json", "--passes", "1", "--formats", "int8-a8", "int4-g64", "codebook4"]
    rows = json.loads(output_of(capsys, *argv))["rows"]
    assert [r["format"] for r in rows] == ["float32", "int8-a8", "int4-g64", "codebook4"]
    least = {"float32": 1 - 1e-6, "int8-a8": 0.99, "int4-g64": 0.9, "codebook4": 0.95}
    for row in rows:
        assert row["cosine"] > least[row["format"]]
        assert row["ms_1"] > 0 and row["ms_32"] > 0
    for row in rows[1:]:
        assert row["megabytes"] < rows[0]["megabytes"]
        assert row["bits_per_weight"] < 9
        assert row["kernels"] and all(k.startswith("linear_") for k in row["kernels"])


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A folder with a small random causal LM and a byte-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=len(alphabet), hidden_size=64, intermediate_size=100, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_demo_of_a_language_model(
    capsys: pytest.CaptureFixture, language_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    argv = ["demo", "--model", str(language_model), "--text", str(text), "--passes", "1"]
    rows = json.loads(output_of(capsys, *argv, "--formats", "int8", "--json"))["rows"]
    assert rows[0]["nll_increase"] == 0
    assert abs(rows[1]["nll_increase"]) < 0.05
    assert rows[1]["layers"] == 2 * 7  # the head is left alone
    table = output_of(capsys, *argv, "--formats", "int4-g32")
    assert "perplexity" in table and "int4-g32" in table and "kernels that ran" in table


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["demo", "--formats", "int99"], "int99"),
        (["demo", "--passes", "0"], "--passes must be at least 1, got 0"),
        (["demo", "--model", "/nowhere"], "is not a Hugging Face folder: it has no config.json"),
    ],
)
def test_failures_are_a_sentence_and_status_1(
    capsys: pytest.CaptureFixture, argv: list[str], sentence: str
) -> None:
    assert main(argv) == 1
    assert sentence in capsys.readouterr().err


def test_a_language_model_wants_a_text(capsys: pytest.CaptureFixture, language_model: Path) -> None:
    assert main(["demo", "--model", str(language_model)]) == 1
    assert "name a file with --text FILE" in capsys.readouterr().err


def test_wrong_usage_is_status_2() -> None:
    for argv in ([], ["nonsense"], ["info", "--nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
