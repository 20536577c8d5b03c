# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder quantized module by module: one float layer is in memory at a time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qkern import model as _model
from qkern.errors import FormatError, UnsupportedError
from qkern.report import Report
from qkern.store import _manifest, _save, _skeleton
from qkern.store._files import is_weights, weight_files
from qkern.store._folder import NewFolder
from qkern.store._manifest import PARTS
from qkern.store._safetensors import ShardWriter, TensorFolder, header_bound, parse_json

_NAMED = 8  # names that an error lists
Tell = Callable[[int, int, str], None]  # modules done, modules in all, name of the next


@dataclass
class FolderReport:
    """What `quantize_folder` did."""

    report: Report
    model_class: str | None  # None: the modules were told by names and shapes
    why_names: str | None  # why they were
    left_out: list[str] = field(default_factory=list)  # tensors that the class does not have

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_class": self.model_class,
            "why_names": self.why_names,
            "left_out": self.left_out,
            **self.report.to_dict(),
        }

    def __str__(self) -> str:
        lines = [str(self.report)]
        if self.model_class is None:
            lines.append(f"Modules told by the names and shapes of tensors: {self.why_names}")
        if self.left_out:
            lines.append(f"Left out, since the model has no place for them: {_few(self.left_out)}")
        return "\n".join(lines)


def quantize_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    fmt: Any,
    *,
    skip: Sequence[str] = ("lm_head",),
    method: str = "rtn",
    strict: bool = False,
    max_shard_bytes: int = _save.SHARD_BYTES,
    tell: Tell | None = None,
) -> FolderReport:
    """`qkern.quantize_` for a folder with config.json and *.safetensors, written to another folder
    as `qkern.save` would, without the model ever being in memory.

    The modules are those of the transformers class that config.json names. Where transformers or
    the class is not there, every float matrix `x.weight` counts as the weight of a linear layer,
    unless a part of its name is that of an embedding or a norm. `tell` hears of every module.
    """
    source, target = Path(source), _save.checked_target(target)
    max_shard_bytes = _save.checked_shard_bytes(max_shard_bytes)
    chooser = _model._Chooser(fmt, skip)
    _model.check_method(method)
    config = _read_config(source)
    with TensorFolder(source, weight_files(source)) as tensors:
        model, result = _skeleton_of(source, tensors)
        names = _Names(model, tensors, result)
        plans = _model._plans(model, chooser, on_meta=True)
        _model._tie(plans)
        with NewFolder(target, _save.is_ours) as new:
            writer = ShardWriter(new, _room(plans), max_shard_bytes)
            for number, plan in enumerate(plans):
                if tell:
                    tell(number, len(plans), plan.name)
                _do(plan, names, method, writer)
            if tell:
                tell(len(plans), len(plans), "")
            _model._settle_ties(plans)
            if strict:
                _model._require_all(plans, chooser)
            result.report = Report(tuple(_model._rows(plans)))
            _model._swap(model, plans)
            _copy_rest(source, new, config)
            _save.finish(new, writer, _save.manifest_of(model))
    return result


# ---- the source ----


def _read_config(source: Path) -> dict[str, Any] | None:
    if (source / _manifest.NAME).is_file():
        raise UnsupportedError(f"{source} holds a model that qkern has quantized already.")
    path = source / "config.json"
    config = parse_json(path.read_bytes(), str(path)) if path.is_file() else None
    if config and config.get("quantization_config"):
        kind = config["quantization_config"]
        kind = kind.get("quant_method") if isinstance(kind, dict) else kind
        raise UnsupportedError(f"The model in {source} is quantized already, by {kind!r}.")
    return config


def _skeleton_of(source: Path, tensors: TensorFolder) -> tuple[torch.nn.Module, FolderReport]:
    try:
        kind, factory = _skeleton.transformers_factory(source)
    except (ImportError, FileNotFoundError, UnsupportedError) as error:
        model = _skeleton.from_names({name: tensors.meta(name) for name in tensors})
        return model, FolderReport(Report(()), None, str(error))
    return _skeleton.build(factory), FolderReport(Report(()), kind, None)


class _Names:
    """From the tensors of the model to those of the files. The model gets their dtypes."""

    def __init__(self, model: torch.nn.Module, tensors: TensorFolder, result: FolderReport) -> None:
        self.tensors = tensors
        self.source: dict[int, str] = {}  # by the id of a tensor of the model
        self._prefix = getattr(model, "base_model_prefix", "")
        twins: dict[int, torch.Tensor] = {}
        wanted: dict[int, list[str]] = {}
        used: set[str] = set()
        places = list(_places(model))
        for full, _, _, tensor in places:
            wanted.setdefault(id(tensor), []).append(full)
            name = self._in_files(full)
            if name is not None:
                used.add(name)
                self.source.setdefault(id(tensor), name)
        lacking = [full[0] for key, full in wanted.items() if key not in self.source]
        if lacking:
            raise FormatError(
                f"The files of {tensors.folder} lack {_few(lacking)}, which "
                f"{result.model_class} has. If transformers renames or merges tensors when it "
                "loads this model, load it with from_pretrained, then use qkern.quantize_ and "
                "qkern.save."
            )
        for full, module, word, tensor in places:
            name = self.source[id(tensor)]
            meta = tensors.meta(name)
            if meta.shape != tensor.shape:
                raise FormatError(
                    f"{name} in {tensors.folder} has the shape {tuple(meta.shape)}, but {full} of "
                    f"{result.model_class} has {tuple(tensor.shape)}."
                )
            if word in module._buffers:
                module._buffers[word] = twins.setdefault(id(tensor), meta)
            else:
                twin = torch.nn.Parameter(meta, tensor.requires_grad and meta.is_floating_point())
                module._parameters[word] = twins.setdefault(id(tensor), twin)  # type: ignore
        self.source = {id(twins[key]): name for key, name in self.source.items()}
        self._keep = twins  # so that no id is used again
        result.left_out = sorted(set(tensors) - used)

    def _in_files(self, name: str) -> str | None:
        """A head's class has its body under a prefix, which files of the body alone lack."""
        prefix = f"{self._prefix}."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self.tensors:
                return candidate
        return None


def _places(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """(full name, module, its name there, tensor) of every tensor that is saved."""
    for name, module in model.named_modules(remove_duplicate=False):
        hidden = module._non_persistent_buffers_set
        for word, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and word not in hidden:
                yield (f"{name}.{word}" if name else word), module, word, tensor


# ---- one module ----


def _room(plans: list[_model._Plan]) -> int:
    names = []
    for plan in plans:
        own = (*plan.module._parameters, *plan.module._buffers)
        names += [(f"{plan.name}.{word}", 4) for word in own]
        # Each weight may become a module of its own within the one that replaces this one.
        names += [(f"{plan.name}.{word}.{part}", 4) for word in own for part in PARTS]
    return header_bound(names)


def _do(plan: _model._Plan, names: _Names, method: str, writer: ShardWriter) -> None:
    prefix = f"{plan.name}." if plan.name else ""
    own = [(word, t) for _, m, word, t in _places(plan.module) if m is plan.module]
    if plan.owner is not None and plan.owner.result is not None:
        # Its weight is written; a bias of its own is not.
        written = {id(t) for _, _, _, t in _places(plan.owner.module)}
        own = [(word, t) for word, t in own if id(t) not in written]
    if plan.format is not None and plan.owner is None:
        _with_numbers(plan, own, names, method)
    if plan.result is not None:
        state = plan.result.state_dict(prefix=prefix)
        for name in sorted(state, key=lambda name: -state[name].element_size()):
            writer.add_tensor(name, state[name])
        plan.result.to("meta")
        _return_memory()
        return
    for word, tensor in own:
        source = names.source.pop(id(tensor), None)
        if source is not None:  # None: tied to one that is written
            entry = names.tensors[source]
            writer.add(prefix + word, entry.dtype, entry.shape, names.tensors.chunks(source))


def _with_numbers(
    plan: _model._Plan, own: list[tuple[str, torch.Tensor]], names: _Names, method: str
) -> None:
    """Quantizes the module of a plan, which has its numbers meanwhile."""
    module = plan.module
    try:
        for word, tensor in own:
            value = names.tensors.read(names.source[id(tensor)])
            if word in module._buffers:
                module._buffers[word] = value
            else:
                module._parameters[word] = torch.nn.Parameter(value, False)
        _model._quantize(plan, method)
    finally:
        for word, tensor in own:
            if word in module._buffers:
                module._buffers[word] = tensor
            else:
                module._parameters[word] = tensor  # type: ignore[assignment]


def _return_memory() -> None:
    """glibc keeps freed blocks of a layer's size in pieces that the next layer does not fit into:
    without this the process grows to several times the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# ---- the rest of the folder ----


def _copy_rest(source: Path, new: NewFolder, config: dict[str, Any] | None) -> None:
    """Tokenizer, templates and so on; of folders within, the texts that describe."""
    if config is not None:
        new.write("config.json", _save.config_text(config))
    for item in sorted(source.iterdir()):
        if item.is_file() and item.name != "config.json" and not is_weights(item.name):
            _copy(item, new, item.name)
        elif item.is_dir() and not item.name.startswith("."):
            for inner in sorted(item.iterdir()):
                if inner.is_file() and inner.suffix in (".json", ".txt"):
                    (new.path / item.name).mkdir(exist_ok=True)
                    _copy(inner, new, f"{item.name}/{inner.name}")


def _copy(item: Path, new: NewFolder, name: str) -> None:
    file = new.create(name)
    with open(item, "rb") as old:
        while piece := old.read(1 << 20):
            file.write(piece)
    file.close()


def _few(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
