# SPDX-License-Identifier: Apache-2.0
"""qkern quantize, inspect, report, bench, tune: what they write and print, and their status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="models are torch modules")
transformers = pytest.importorskip("transformers", reason="the folders are those of transformers")
package = pytest.importorskip("safetensors.torch", reason="the package safetensors")

import qkern  # noqa: E402
from qkern.cli import bench, main  # noqa: E402

IDS = torch.arange(3, 15)[None]
SMALL: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Gemma3ForCausalLM": {"head_dim": 16, "tie_word_embeddings": True},
    "BertForSequenceClassification": {},
    "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 64, "n_head": 4},
}


def source_folder(folder: Path, kind: str = "LlamaForCausalLM", **saving: Any) -> Path:
    cls = getattr(transformers, kind)
    config = cls.config_class(
        **{
            "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            **SMALL[kind],
        }
    )  # fmt: skip
    torch.manual_seed(0)
    cls(config).to(torch.bfloat16).save_pretrained(folder, **saving)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_folder(tmp_path_factory.mktemp("hf") / "src", max_shard_size="50KB")


def told(capsys: pytest.CaptureFixture, *argv: object) -> Any:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS)[0]


# ---- quantize ----


@pytest.mark.parametrize("kind", SMALL)
def test_a_folder_becomes_what_quantize_would_make(
    capsys: pytest.CaptureFixture, tmp_path: Path, kind: str
) -> None:
    """The same bits as from_pretrained and quantize_, tied weights and unsaved buffers included,
    and the same report."""
    src = source_folder(tmp_path / "src", kind)
    out = tmp_path / "out"
    argv = ("quantize", src, "-o", out, "--format", "int4-g32", "--map", "layer.0.*=int8-a8")
    found = told(capsys, *argv)
    assert found["model_class"] == kind and not found["left_out"]
    model = getattr(transformers, kind).from_pretrained(src, dtype=torch.bfloat16)
    report = qkern.quantize_(model, {"layer.0.*": "int8-a8", "*": "int4-g32"}, progress=False)
    assert found["modules"] == report.to_dict()["modules"]
    assert torch.equal(logits(qkern.load(None, out)), logits(model))
    make = getattr(transformers, kind)
    assert torch.equal(logits(qkern.load(lambda: make(model.config), out)), logits(model))
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "1_Pooling" / "config.json").is_file()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "qkern"


def test_shards_in_and_out(capsys: pytest.CaptureFixture, source: Path, tmp_path: Path) -> None:
    assert len(list(source.glob("*.safetensors"))) > 2
    shards = ("--max-shard-size", "20KB")
    told(capsys, "quantize", source, "-o", tmp_path / "a", "--format", "nf4", *shards)
    told(capsys, "quantize", source, "-o", tmp_path / "b", "--format", "nf4")
    assert len(list((tmp_path / "a").glob("model-*-of-*.safetensors"))) > 2
    loaded = [logits(qkern.load(None, tmp_path / name)) for name in "ab"]
    assert torch.equal(*loaded)


def test_without_a_class_names_and_shapes_tell(
    capsys: pytest.CaptureFixture, source: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    tensors = {n: t for f in source.glob("*.safetensors") for n, t in package.load_file(f).items()}
    package.save_file(tensors, plain / "weights.safetensors")
    found = told(capsys, "quantize", plain, "-o", tmp_path / "out", "--format", "int8")
    assert found["model_class"] is None and "has no config.json" in found["why_names"]
    assert found["quantized_count"] == 2 * 7
    names = {row["name"] for row in found["modules"] if row["format"] is None}
    assert "model.embed_tokens" in names and "model.norm" in names
    config = transformers.AutoConfig.from_pretrained(source)
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    qkern.quantize_(model, "int8", progress=False)
    loaded = qkern.load(lambda: transformers.LlamaForCausalLM(config), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


def test_a_transformers_model_is_saved_with_its_class(source: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    qkern.quantize_(model, "int4-g32", progress=False)
    model.generation_config.max_new_tokens = 7
    qkern.save(model, tmp_path / "m")
    loaded = qkern.load(None, tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.max_new_tokens == 7


MEMORY = """
import sys
from qkern.cli import main
import torch, transformers, qkern
from qkern.store import quantize_folder
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
def memory(word):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(word)))
what, source, target = sys.argv[1:]
def work(source, target):
    if what == "quantize":
        quantize_folder(source, target, "int8")
    else:
        qkern.load(None, source)
work(source + "-small", target + "-small")  # what is loaded and allocated once
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = memory("VmRSS")
work(source, target)
print(memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 MB of float16 in 24 equal layers, and the same with one of them."""
    folder = tmp_path_factory.mktemp("large")
    for name, layers in (("src", 24), ("src-small", 1)):
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=512, intermediate_size=1920, num_hidden_layers=layers,
            num_attention_heads=8,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        noise = torch.randn(512 * 1920, dtype=torch.float16)
        state = {n: noise[: p.numel()].view(p.shape).clone() for n, p in model.named_parameters()}
        (folder / name).mkdir()
        package.save_file(state, folder / name / "model.safetensors", {"format": "pt"})
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
    return folder


def grown(what: str, source: Path, target: Path) -> int:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of memory cannot be reset on this system")
    code = [sys.executable, "-c", MEMORY, what, str(source), str(target)]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(what, done.stdout)
    return int(done.stdout.split()[-1])


def test_quantizing_needs_the_memory_of_one_layer(large: Path, tmp_path: Path) -> None:
    """A run over one layer of the same size first, so that the growth is what the number of
    layers adds. 48 MB are a dozen float32 copies of a matrix; the model has 192 MB."""
    size = (large / "src" / "model.safetensors").stat().st_size
    assert size > 190e6
    assert grown("quantize", large / "src", tmp_path / "out") < 48e6
    # Loading takes one copy of what was saved, and no more than 32 MB beside it.
    (tmp_path / "out").rename(tmp_path / "m")
    (tmp_path / "out-small").rename(tmp_path / "m-small")
    saved = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert saved > 95e6
    assert grown("load", tmp_path / "m", tmp_path) < saved + 32e6


def test_an_interruption_leaves_nothing(
    capsys: pytest.CaptureFixture, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkern import model

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_quantize", stop)
    assert main(["quantize", str(source), "-o", str(tmp_path / "out"), "--format", "int8"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_quantized_is_a_sentence(
    capsys: pytest.CaptureFixture, source: Path, tmp_path: Path
) -> None:
    def fails(folder: object, *more: object, output: object = "out") -> str:
        argv = ["quantize", folder, "-o", tmp_path / str(output), "--format", "int8", *more]
        assert main([*map(str, argv)]) == 1
        text = capsys.readouterr().err
        assert text.startswith("qkern quantize: ") and "Traceback" not in text
        return text

    def variant(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    assert "is no folder" in fails(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no *.safetensors files" in fails(tmp_path / "empty")
    (tmp_path / "empty" / "model.gguf").write_text("x")
    assert "model.gguf is of a kind that is not read here" in fails(tmp_path / "empty")
    assert "lack model.layers.2." in fails(variant("more layers", num_hidden_layers=3))
    assert "has the shape (96, 64)" in fails(variant("wider", intermediate_size=100))
    assert "quantized already, by 'gptq'" in fails(
        variant("gptq", quantization_config={"quant_method": "gptq"})
    )
    assert "strict=True" in fails(source, "--strict", "--map", "nothing=int4")
    told(capsys, "quantize", source, "-o", tmp_path / "out", "--format", "int8")
    assert "qkern has quantized already" in fails(tmp_path / "out", output="again")
    assert "add --overwrite" in fails(source)
    told(capsys, "quantize", source, "-o", tmp_path / "out", "--format", "nf4", "--overwrite")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    "more", [["--format", "int99"], [], ["--format", "int8", "--map", "x"],
             ["--format", "int8", "--max-shard-size", "0"], ["--format", "int8", "--method", "x"]]
)  # fmt: skip
def test_wrong_usage_is_status_2(source: Path, tmp_path: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(source), "-o", str(tmp_path / "out"), *more])
    assert stop.value.code == 2


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError):
        main(["inspect", str(tmp_path / "nowhere"), "--debug"])


# ---- inspect and report ----


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qkern.store import quantize_folder

    out = tmp_path_factory.mktemp("hf") / "out"
    quantize_folder(source, out, {"layers.0.*": "int4-g32", "*": "codebook4"})
    return out


def test_inspect_counts_every_byte(capsys: pytest.CaptureFixture, quantized: Path) -> None:
    found = told(capsys, "inspect", quantized)
    assert found["kind"] == "qkern" and len(found["modules"]) == 14
    first = found["modules"][0]
    assert (first["format"], first["shape"]) == ("int4-g32", [64, 64])
    assert first["bytes"] == 64 * 32 + 64 * 2 * 2 and first["bits_per_weight"] == 4.5
    tensors = package.load_file(quantized / "model.safetensors")
    assert found["total_bytes"] == sum(
        t.nbytes for n, t in tensors.items() if not n.startswith("qkern.padding")
    )
    assert found["tied_tensors"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert main(["inspect", str(quantized)]) == 0
    text = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in text and "14 quantized modules" in text


def test_inspect_of_plain_files(capsys: pytest.CaptureFixture, source: Path) -> None:
    found = told(capsys, "inspect", source)
    file = sorted(source.glob("*.safetensors"))[0]
    one = told(capsys, "inspect", file)
    assert found["kind"] == one["kind"] == "safetensors" and not found["modules"]
    assert {t["name"] for t in one["tensors"]} == set(package.load_file(file))
    assert found["bits_per_weight"] is None


def test_inspect_needs_no_torch(quantized: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from qkern.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "inspect", str(quantized)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "14 quantized modules" in done.stdout


def test_inspect_finds_damage(
    capsys: pytest.CaptureFixture, quantized: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for file in quantized.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "qkern.json").read_text())
    manifest["modules"]["model.layers.0.self_attn.q_proj"]["format"] = "int8"
    (folder / "qkern.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(folder)]) == 1
    assert "q_proj.codes must be uint8 [64, 64] for int8" in capsys.readouterr().err
    os.truncate(folder / "model.safetensors", 5000)
    assert main(["inspect", str(folder)]) == 1
    assert "safetensors" in capsys.readouterr().err


def test_report_measures_the_error_of_every_layer(
    capsys: pytest.CaptureFixture, source: Path, quantized: Path
) -> None:
    found = told(capsys, "report", quantized, source)
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert len(found["modules"]) == 14
    for row in found["modules"]:
        weight = model.get_submodule(row["name"]).weight.detach()
        fmt = "int4-g32" if "layers.0" in row["name"] else "codebook4"
        change = qkern.quantize(weight, fmt).dequantize() - weight
        assert row["error"] == pytest.approx(float(change.norm() / weight.norm()), rel=1e-5)
        assert 18 < row["snr_db"] < 27
    assert 0.05 < found["error"] < 0.15
    sizes = told(capsys, "report", quantized)
    assert sizes["error"] is None and sizes["total_bytes"] == found["total_bytes"]
    assert main(["report", str(quantized), str(source)]) == 0
    assert "14 quantized modules" in capsys.readouterr().out


def test_report_draws(
    capsys: pytest.CaptureFixture, source: Path, quantized: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    argv = ["report", str(quantized), str(source), "--plot", str(tmp_path / "a.png")]
    assert main(argv) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="draws the plot")
    assert main(argv) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---- bench and tune ----


def test_bench_names_the_kernels_that_ran(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind of format; times are printed, not asserted."""
    monkeypatch.setattr(bench, "cache_bytes", lambda: 20_000)
    formats = ("int4-g32", "int8-a8", "int4-asym-g32", "codebook4-a8", "codebook4-group-g32",
               "mxfp4", "nvfp4", "nf4")  # fmt: skip
    argv = ("bench", "--shape", "64x96", "--m", 1, 3, "--seconds", 0.001, "--format", *formats)
    rows = told(capsys, *argv)["rows"]
    assert [(r["format"], r["m"]) for r in rows] == [
        (str(qkern.parse_format(f)) if f != "float32" else f, m)
        for f in ("float32", *formats) for m in (1, 3)
    ]  # fmt: skip
    assert {r["kernel"] for r in rows if r["format"] == "float32"} == {"torch"}
    assert all(r["kernel"].startswith("linear_") for r in rows if r["format"] != "float32")
    assert all(r["microseconds"] > 0 and r["gigabytes_per_second"] > 0 for r in rows)


def test_bench_uses_more_weights_than_the_cache_holds() -> None:
    for nbytes in (10**5, 10**6, 10**8):
        assert bench.copies_for(nbytes, 32 << 20) * nbytes >= 2 * (32 << 20)
    assert bench.copies_for(10**10, 32 << 20) == 1


def test_bench_refuses_shapes_that_are_none() -> None:
    for argv in (["--shape", "12"], ["--shape", "0x8"], ["--m", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(["bench", *argv])
        assert stop.value.code == 2


def test_tune_lists_what_it_would_measure(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("triton", reason="tune chooses configurations of Triton kernels")
    found = told(capsys, "tune", "--dry-run", "--formats", "int4-g128", "--shapes", "512x512")
    assert found and all("int4-g128|512x512" in line for line in found)
    assert main(["tune", "--shapes", "12"]) == 2


def test_every_command_explains_itself(capsys: pytest.CaptureFixture) -> None:
    from qkern.cli import COMMANDS

    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "--json" in text and "--debug" in text and len(text.splitlines()) > 8
