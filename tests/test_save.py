# SPDX-License-Identifier: Apache-2.0
"""save and load: the same bits come back, what does not fit is named, and nothing is half done."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="models are torch modules")

import qkern  # noqa: E402
from qkern.errors import FormatError, UnsupportedError  # noqa: E402

FORMATS = (
    "int2-g16", "int3-g8-asym", "int4-g32-a8g", "int8-a8", "codebook4", "codebook3-tensor-g16",
    "codebook4-a8", "codebook2-group-g16", "nf4", "fp4-g32", "iq4nl", "mxfp4", "nvfp4",
)  # fmt: skip


class Rotary(torch.nn.Module):
    """A buffer that the constructor computes and no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", (torch.arange(33) / 32).exp(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.frequencies


class Model(torch.nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 33)
        self.rotary = Rotary()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(33, 33) for _ in FORMATS])
        self.norm = torch.nn.BatchNorm1d(33)
        self.head = torch.nn.Linear(33, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.rotary(self.embed(ids))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


IDS = torch.arange(20)


def quantized(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    model(IDS)  # statistics of the norm
    formats = {f"layers.{i}": fmt for i, fmt in enumerate(FORMATS)}
    qkern.quantize_(model, formats, progress=False, strict=True)
    return model.eval()


@torch.no_grad()
def run(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS)


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


# ---- the same comes back ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", ["factory", "float", "quantized", "other formats", "meta"])
def test_the_same_bits_come_back(tmp_path: Path, how: str, packed: bool) -> None:
    model = quantized()
    expected = run(copy.deepcopy(model))
    if packed:
        run(model)
        assert model.layers[0].weight.is_packed
    qkern.save(model, tmp_path / "m")
    target: Any = Model
    if how == "float":
        target = Model().train()
    elif how == "quantized":
        target = quantized(1)
    elif how == "other formats":
        target = Model()
        qkern.quantize_(target, "int8", progress=False, skip=("head",))
    elif how == "meta":
        with torch.device("meta"):
            target = Model()
        target.rotary = Rotary()
    loaded = qkern.load(target, tmp_path / "m")
    if how == "factory":
        assert not loaded.training
    else:
        assert loaded is target and loaded.training == (how in ("float", "other formats", "meta"))
    assert loaded.head.weight is loaded.embed.weight
    saved, back = model.state_dict(), loaded.state_dict()
    assert saved.keys() == back.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == back[name].dtype and torch.equal(tensor, back[name]), name
    assert torch.equal(run(loaded), expected)
    assert [str(layer.format) for layer in loaded.layers] == list(FORMATS)


def test_what_a_folder_holds(tmp_path: Path) -> None:
    """The package safetensors reads the tensors, canonical and each once; JSON says the rest."""
    package = pytest.importorskip("safetensors.torch", reason="the package safetensors")
    model = quantized()
    qkern.save(model, tmp_path / "m")
    assert sorted(listing(tmp_path / "m")) == ["model.safetensors", "qkern.json"]
    tensors = package.load_file(tmp_path / "m" / "model.safetensors")
    named = {n: t for n, t in tensors.items() if not n.startswith("qkern.padding.")}
    assert set(named) == set(model.state_dict()) - {"head.weight"}
    assert torch.equal(named["layers.4.codes"], model.layers[4].codes)
    told = json.loads((tmp_path / "m" / "qkern.json").read_text())
    assert (told["format"], told["version"]) == ("qkern", 1)
    assert told["qkern_version"] == qkern.__version__
    assert told["tied_tensors"] == {"head.weight": "embed.weight"}
    for i, fmt in enumerate(FORMATS):
        facts = told["modules"][f"layers.{i}"]
        assert (facts["class"], facts["format"], facts["shape"]) == ("Linear", fmt, [33, 33])


def test_large_models_are_several_files(tmp_path: Path) -> None:
    model = quantized()
    qkern.save(model, tmp_path / "m", max_shard_bytes=4000)
    names = sorted(listing(tmp_path / "m"))
    shards = [n for n in names if n.endswith(".safetensors")]
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert torch.equal(run(qkern.load(Model, tmp_path / "m")), run(model))
    qkern.save(model, tmp_path / "m")  # the old shards go
    assert sorted(listing(tmp_path / "m")) == ["model.safetensors", "qkern.json"]
    with pytest.raises(ValueError, match="at least 1, but 0 came"):
        qkern.save(model, tmp_path / "m", max_shard_bytes=0)


def test_one_module_in_two_places_stays_one(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def make() -> torch.nn.Module:
        layer = torch.nn.Linear(16, 16)
        return torch.nn.Sequential(layer, torch.nn.ReLU(), layer)

    model = make()
    qkern.quantize_(model, "int4-g16", progress=False)
    qkern.save(model, tmp_path / "m")
    for target in (make, make(), torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(),
                                                     torch.nn.Linear(16, 16))):  # fmt: skip
        loaded = qkern.load(target, tmp_path / "m")
        assert loaded[0] is loaded[2]
        x = torch.randn(3, 16)
        assert torch.equal(loaded(x), model(x))


def test_modules_with_one_weight_keep_sharing_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24))
    qkern.quantize_(model, "nf4", progress=False)
    model[1].tie_(model[0])
    qkern.save(model, tmp_path / "m")
    told = json.loads((tmp_path / "m" / "qkern.json").read_text())
    assert told["tied_weights"] == {"1": "0"} and "1.codes" not in told["files"]
    loaded = qkern.load(
        lambda: torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24)),
        tmp_path / "m",
    )
    assert loaded[1].is_tied_to(loaded[0])
    x = torch.randn(2, 24)
    assert torch.equal(loaded(x), model(x))


def test_a_model_that_is_one_module(tmp_path: Path) -> None:
    layer = qkern.nn.Linear.from_float(torch.nn.Linear(40, 8), "codebook3")
    qkern.save(layer, tmp_path / "m")
    x = torch.randn(2, 40)
    assert torch.equal(qkern.load(lambda: torch.nn.Linear(40, 8), tmp_path / "m")(x), layer(x))
    target = qkern.nn.Linear(40, 8, format="int8")
    assert qkern.load(target, tmp_path / "m") is target
    assert torch.equal(target(x), layer(x))


def test_act_order_comes_back(tmp_path: Path) -> None:
    weight = qkern.quantize(torch.randn(8, 32), "int4-g16")
    perm = torch.randperm(32).to(torch.int32)
    weight = qkern.QuantizedTensor.from_parts("int4-g16", (8, 32), perm=perm, **weight.parts())
    model = torch.nn.Sequential(qkern.nn.Linear.from_weight(weight))
    qkern.save(model, tmp_path / "m")
    loaded = qkern.load(lambda: torch.nn.Sequential(torch.nn.Linear(32, 8, False)), tmp_path / "m")
    assert torch.equal(loaded[0].perm, perm)
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), model(x))


def test_published_model_writes_the_same_text(tmp_path: Path, shared_data: Path) -> None:
    from test_real_models import PUBLISHED_TEXT, text_hash

    from llama2c import Llama

    def make() -> Llama:
        return Llama(shared_data / "llm/stories260K/stories260K.bin")

    model = make()
    qkern.quantize_(model, "int8", progress=False)
    qkern.save(model, tmp_path / "m", max_shard_bytes=100_000)
    with torch.inference_mode():
        assert text_hash(qkern.load(make(), tmp_path / "m").greedy(201)) == PUBLISHED_TEXT


ISA_CHILD = """
import sys, torch, qkern
what, folder, out = sys.argv[1:]
torch.manual_seed(0)
make = lambda: torch.nn.Sequential(*[torch.nn.Linear(100, 100) for _ in range(5)])
formats = ("int4-g32", "int4-g32-a8", "codebook4", "nf4", "int8-a8")
x = torch.linspace(-3, 3, 700).view(7, 100)
if what == "save":
    model = make()
    qkern.quantize_(model, {str(i): f for i, f in enumerate(formats)}, progress=False)
    y = model(x)  # packed now, for this instruction set
    qkern.save(model, folder)
else:
    y = qkern.load(make, folder)(x)
print(qkern.info()["cpu"]["isa"])
torch.save(y.detach(), out)
"""


def test_saved_under_avx2_loads_under_avx512_with_the_same_bits(tmp_path: Path) -> None:
    results = []
    for what, isa in (("save", "avx2"), ("load", "avx512vnni")):
        code = [sys.executable, "-c", ISA_CHILD, what, str(tmp_path / "m"), str(tmp_path / isa)]
        done = subprocess.run(
            code, env={**os.environ, "QKERN_ISA": isa}, capture_output=True, text=True
        )
        if done.returncode and "QKERN_ISA" in done.stderr:
            pytest.skip(f"this processor has no {isa}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [isa]
        results.append(torch.load(tmp_path / isa))
    assert torch.equal(*results)


# ---- the meta device ----


def test_a_factory_makes_no_parameter_and_all_else(tmp_path: Path) -> None:
    """Parameters are on meta before they are initialized; buffers that no file holds are real."""
    seen = []

    class Watched(Model):
        def __init__(self) -> None:
            super().__init__()
            seen.extend(p.device.type for p in self.parameters())
            seen.append(self.rotary.frequencies.device.type)

    qkern.save(quantized(), tmp_path / "m")
    loaded = qkern.load(Watched, tmp_path / "m")
    assert set(seen[:-1]) == {"meta"} and seen[-1] == "cpu"
    assert torch.equal(loaded.rotary.frequencies, Rotary().frequencies)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert Model().embed.weight.device.type == "cpu"  # the hook is gone


def test_a_meta_model_with_unsaved_buffers_is_refused(tmp_path: Path) -> None:
    qkern.save(quantized(), tmp_path / "m")
    with torch.device("meta"):
        model = Model()
    with pytest.raises(FormatError, match=r"rotary\.frequencies.*give qkern\.load a function"):
        qkern.load(model, tmp_path / "m")
    assert type(model.layers[0]) is torch.nn.Linear

    def careless() -> Model:
        with torch.device("meta"):
            return Model()

    with pytest.raises(FormatError, match=r"rotary\.frequencies.*leave the device to qkern\.load"):
        qkern.load(careless, tmp_path / "m")


# ---- what does not fit ----


def state(model: torch.nn.Module) -> list[tuple[str, int]]:
    modules = [(n, id(m)) for n, m in model.named_modules()]
    tensors = [(n, id(t)) for n, t in (*model.named_parameters(), *model.named_buffers())]
    return modules + tensors


def test_all_that_does_not_fit_is_named_and_the_model_is_unchanged(tmp_path: Path) -> None:
    qkern.save(quantized(), tmp_path / "m")
    model = Model()
    model.extra = torch.nn.Linear(2, 2)
    model.layers[3] = torch.nn.Linear(33, 34)
    model.norm = torch.nn.BatchNorm1d(12)
    del model.layers[-1]
    before = state(model)
    with pytest.raises(FormatError) as error:
        qkern.load(model, tmp_path / "m")
    text = str(error.value)
    assert "the folder lacks extra.weight, extra.bias" in text
    assert f"no place for layers.{len(FORMATS) - 1} (a Linear)" in text
    assert "layers.3 (a Linear), which has out_features 33 and not 34" in text
    assert "norm.weight has the shape (33,), not (12,)" in text
    assert state(model) == before


def test_not_strict_leaves_out_what_only_one_side_has(tmp_path: Path) -> None:
    model = quantized()
    qkern.save(model, tmp_path / "m")
    target = Model()
    target.extra = torch.nn.Linear(2, 2)
    extra = target.extra.weight
    del target.norm.running_mean
    qkern.load(target, tmp_path / "m", strict=False)
    assert target.extra.weight is extra
    assert torch.equal(target.layers[0].codes, model.layers[0].codes)

    def with_more() -> Model:
        made = Model()
        made.extra = torch.nn.Linear(2, 2)
        return made

    with pytest.raises(FormatError, match=r"lacks extra\.weight, extra\.bias"):
        qkern.load(with_more, tmp_path / "m", strict=False)  # they would have no numbers


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        meta = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        qkern.save(meta, tmp_path / "m")
    sparse = torch.nn.Module()
    sparse.register_buffer("b", torch.eye(3).to_sparse())
    with pytest.raises(UnsupportedError, match="only plain dense tensors"):
        qkern.save(sparse, tmp_path / "m")

    class Stateful(torch.nn.Module):
        def get_extra_state(self) -> dict:
            return {"a": 1}

    with pytest.raises(UnsupportedError, match="state that is no tensor"):
        qkern.save(torch.nn.Sequential(Stateful()), tmp_path / "m")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, but it is dict"):
        qkern.save({}, tmp_path / "m")
    assert not any(tmp_path.iterdir())


# ---- damaged and hostile folders ----


def change(name: str, value: Any) -> Any:
    def apply(told: dict) -> None:
        told[name] = value

    return apply


def change_module(**facts: Any) -> Any:
    def apply(told: dict) -> None:
        told["modules"]["layers.0"].update(facts)

    return apply


def change_config(**facts: Any) -> Any:
    def apply(told: dict) -> None:
        told["modules"]["layers.0"]["config"].update(facts)

    return apply


HOSTILE = {
    "future": (change("version", 2), "use a newer one"),
    "no version": (change("version", "1"), "does not say that it is of the format"),
    "another format": (change("format", "x"), "does not say that it is of the format"),
    "modules": (change("modules", []), "'modules'"),
    "module": (change("modules", {"layers.0": 1}), "lacks a class or a config"),
    "files": (change("files", {"a": 1}), "'files'"),
    "path": (lambda t: t["files"].update(a="../../secret"), "not the plain name of a file"),
    "absolute": (lambda t: t["files"].update(a="/etc/passwd"), "not the plain name of a file"),
    "no file": (lambda t: t["files"].update(a="model-2.safetensors"), "should hold the file"),
    "other tensor": (lambda t: t["files"].update(a="model.safetensors"), "holds 'a', but"),
    "one less": (lambda t: t["files"].pop("norm.bias"), "does not know of it"),
    "tie to nothing": (change("tied_tensors", {"head.weight": "x"}), "which is not saved"),
    "share nothing": (change("shared", {"a": "b"}), "is no module"),
    "tied weights": (change("tied_weights", {"layers.0": "layers.1"}), "share one weight"),
    "class": (change_module(**{"class": "os.system"}), "a class that qkern.nn does not have"),
    "base": (change_module(**{"class": "QuantizedModule"}), "cannot be built from its config"),
    "config": (change_module(config={}), "cannot be built from its config"),
    "shape": (change_module(shape=[1, 2]), "contradicts its config"),
    "format": (change_config(format="int99"), "cannot be built from its config"),
    "dtype": (change_config(compute_dtype="load"), "cannot be built from its config"),
    "huge": (change_config(in_features=2**62, out_features=2**62), "cannot be built"),
    "negative": (change_config(in_features=-1), "cannot be built from its config"),
    "text": (change_config(in_features="33"), "cannot be built from its config"),
    "larger": (change_config(in_features=34), "contradicts its config"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    qkern.save(quantized(), folder)
    return folder


def copy_of(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    for name, data in listing(saved).items():
        (tmp_path / "m" / name).write_bytes(data)
    return tmp_path / "m"


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_a_sentence(saved: Path, tmp_path: Path, case: str) -> None:
    folder = copy_of(saved, tmp_path)
    apply, sentence = HOSTILE[case]
    told = json.loads((folder / "qkern.json").read_text())
    apply(told)
    (folder / "qkern.json").write_text(json.dumps(told))
    model = Model()
    before = state(model)
    with pytest.raises(FormatError, match=sentence):
        qkern.load(model, folder)
    assert state(model) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"a":1,"a":2}', "\x00"])
def test_a_manifest_that_is_no_json(saved: Path, tmp_path: Path, text: str) -> None:
    folder = copy_of(saved, tmp_path)
    (folder / "qkern.json").write_text(text)
    with pytest.raises(FormatError, match=r"qkern\.json"):
        qkern.load(Model, folder)


def test_weights_with_bad_numbers_are_refused(tmp_path: Path) -> None:
    model = quantized()
    model.layers[0].scales = torch.full_like(model.layers[0].scales, float("nan"))
    qkern.save(model, tmp_path / "m")
    with pytest.raises(FormatError, match=r"layers\.0.*scales must be finite"):
        qkern.load(Model, tmp_path / "m")


def test_a_cut_file_is_refused(saved: Path, tmp_path: Path) -> None:
    path = copy_of(saved, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="it was cut"):
        qkern.load(Model, path.parent)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is nothing"):
        qkern.load(Model, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it has no qkern\.json"):
        qkern.load(Model, tmp_path)
    with pytest.raises(TypeError, match="a function that makes one, or None"):
        qkern.save(quantized(), tmp_path / "m")
        qkern.load(3, tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="made a int"):
        qkern.load(lambda: 3, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        qkern.load(None, tmp_path / "m")


# ---- every class of module ----


class Mixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 32, padding_idx=0)
        self.conv = torch.nn.Conv1d(32, 32, 3, padding=1, groups=2)
        self.image = torch.nn.Conv2d(1, 4, (3, 2), stride=(2, 1), bias=False)
        self.head = torch.nn.Linear(32, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).T).T
        return self.head(x) + self.image(x[None, :5]).sum()


def test_embeddings_and_convolutions_come_back(tmp_path: Path) -> None:
    """Config, padding index and stride; the embedding and the head keep sharing one weight, and
    the head its own bias."""
    torch.manual_seed(0)
    model = Mixed()
    report = qkern.quantize_(model, {"embed": "int8", "*": "int8"}, skip=(), progress=False)
    assert report.quantized_count == 4
    assert model.head.is_tied_to(model.embed)
    expected = run(model)
    qkern.save(model, tmp_path / "m")
    told = json.loads((tmp_path / "m" / "qkern.json").read_text())
    assert told["tied_weights"] == {"head": "embed"} and "head.codes" not in told["files"]
    for target in (Mixed, Mixed()):
        loaded = qkern.load(target, tmp_path / "m")
        assert loaded.head.is_tied_to(loaded.embed) and loaded.embed.padding_idx == 0
        assert torch.equal(run(loaded), expected)
    other = Mixed()
    other.image = torch.nn.Conv2d(1, 4, (3, 2), stride=(1, 1), bias=False)
    with pytest.raises(FormatError, match=r"image \(a Conv2d\), which has stride"):
        qkern.load(other, tmp_path / "m")


def test_experts_come_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="its mixture of experts")
    config = transformers.MixtralConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    report = qkern.quantize_(model, "int4-g16", progress=False)
    assert any(row.kind == "MixtralExperts" for row in report.quantized)
    with torch.no_grad():
        expected = model(IDS[None]).logits
        qkern.save(model, tmp_path / "m")
        loaded = qkern.load(None, tmp_path / "m")
        assert torch.equal(loaded(IDS[None]).logits, expected)
