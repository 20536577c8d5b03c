# SPDX-License-Identifier: Apache-2.0
"""qkern.save: a model with quantized modules into a folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qkern.errors import UnsupportedError
from qkern.nn._base import QuantizedModule
from qkern.store import _manifest
from qkern.store._files import INDEX, is_weights
from qkern.store._folder import NewFolder
from qkern.store._manifest import PARTS, Manifest
from qkern.store._safetensors import ShardWriter, header_bound

SHARD_BYTES = 5_000_000_000


def save(
    model: torch.nn.Module, folder: str | os.PathLike, *, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a model into a folder: its tensors as safetensors, what they mean as qkern.json.

    Weights are written in canonical storage, the same for every machine; tensors that modules
    share, once. Tensors above `max_shard_bytes` together go into several files. Of a transformers
    model the configuration is written too.

    The folder appears whole or not at all: where this fails or is interrupted, an older model in
    that folder stays as it was. Other files of an old folder (a tokenizer) are kept.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    target = checked_target(folder)
    max_shard_bytes = checked_shard_bytes(max_shard_bytes)
    manifest = manifest_of(model)
    with NewFolder(target, is_ours) as new:
        writer = ShardWriter(new, header_room(model), max_shard_bytes)
        for name, tensor in saved_tensors(model, manifest):
            writer.add_tensor(name, tensor)
        for name, data in _transformers_files(model).items():
            new.write(name, data)
        finish(new, writer, manifest)


def checked_target(folder: str | os.PathLike) -> Path:
    target = Path(folder)
    if target.is_dir() and not (target / _manifest.NAME).is_file():
        for item in sorted(os.listdir(target)):
            if is_weights(item):
                raise FileExistsError(
                    f"{target} holds weights that qkern did not write ({item}); "
                    "name another folder, or remove them first."
                )
    return target


def checked_shard_bytes(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"max_shard_bytes must be an integer of at least 1, but {size!r} came.")
    return size


def is_ours(name: str) -> bool:
    return name == _manifest.NAME or is_weights(name)


def finish(new: NewFolder, writer: ShardWriter, manifest: Manifest) -> None:
    """The files that are written last: qkern.json makes a folder a model."""
    manifest.files = writer.finish()
    if len(manifest.file_names()) > 1:
        new.write(INDEX, manifest.index(writer.total))
    new.write(_manifest.NAME, manifest.to_json())


# ---- what is saved ----


def manifest_of(model: torch.nn.Module) -> Manifest:
    """All of it but the files."""
    manifest = Manifest()
    first_place: dict[int, str] = {}
    weights: list[tuple[str, QuantizedModule]] = []
    for name, module, ours in _manifest.outermost(model):
        if ours and id(module) in first_place:
            manifest.shared[name] = first_place[id(module)]
        elif ours is not None:
            first_place[id(module)] = name
            manifest.modules[name] = _manifest.describe(ours)
            for inner, part in module.named_modules(prefix=name):
                if isinstance(part, QuantizedModule):
                    owner = next((n for n, w in weights if part.is_tied_to(w)), None)
                    if owner is None:
                        weights.append((inner, part))
                    else:
                        manifest.tied_weights[inner] = owner
    first: dict[int, tuple[str, torch.Tensor]] = {}  # the tensor too, so that no id is reused
    for name, tensor in _plain_tensors(model, manifest):
        owner, _ = first.setdefault(id(tensor), (name, tensor))
        if owner != name:
            manifest.tied_tensors[name] = owner
    return manifest


def saved_tensors(model: torch.nn.Module, manifest: Manifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor once, in the order of the model. Those of a quantized module may be fresh."""
    for name, module, ours in _manifest.outermost(model):
        if ours and name in manifest.shared:
            continue
        if not ours:
            tensors = _own_tensors(name, module)
        else:
            state = _own_state(name, module, manifest)
            tensors = iter(sorted(state.items(), key=lambda item: -item[1].element_size()))
        for full, tensor in tensors:
            if full not in manifest.tied_tensors:
                yield full, tensor


def _own_state(name: str, module: torch.nn.Module, manifest: Manifest) -> dict[str, torch.Tensor]:
    state = module.state_dict(prefix=f"{name}." if name else "")
    for inner in manifest.tied_weights:
        if inner == name or inner.startswith(f"{name}."):
            part = module.get_submodule(inner[len(name) :].lstrip("."))
            assert isinstance(part, QuantizedModule)
            for part_name in part.parts():
                state.pop(f"{inner}.{part_name}", None)
    return state


def _plain_tensors(
    model: torch.nn.Module, manifest: Manifest
) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that keep their identity: of float modules, and parameters of quantized ones."""
    for name, module, ours in _manifest.outermost(model):
        if name in manifest.shared:
            continue
        if ours:
            yield from module.named_parameters(prefix=name, remove_duplicate=False)
        else:
            yield from _own_tensors(name, module)


def _own_tensors(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of the module itself."""
    state: dict[str, Any] = {}
    module._save_to_state_dict(state, f"{name}." if name else "", keep_vars=True)
    for full, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedError(
                f"{full} is a {type(tensor).__name__}, state that is no tensor; it cannot be saved."
            )
        yield full, tensor


def header_room(model: torch.nn.Module) -> int:
    """Bytes that the header of no file can exceed, without unpacking a weight."""
    names: list[tuple[str, int]] = []
    for name, module, ours in _manifest.outermost(model):
        if not ours:
            names += [(full, tensor.dim()) for full, tensor in _own_tensors(name, module)]
            continue
        for inner, part in module.named_modules(prefix=name):
            own = (*PARTS, *part._parameters, *part._buffers)
            names += [(f"{inner}.{word}", 4) for word in own]
    return header_bound(names)


def _transformers_files(model: torch.nn.Module) -> dict[str, bytes]:
    """config.json of a transformers model, so that `load(None, folder)` can build it."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    config: Any = model.config
    data = {**config.to_diff_dict(), "architectures": [type(model).__name__]}
    files = {"config.json": config_text(json.loads(json.dumps(data, default=str)))}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        files["generation_config.json"] = generation.to_json_string().encode()
    return files


def config_text(config: dict[str, Any]) -> bytes:
    """config.json that names qkern, so that no other program takes the weights for float ones."""
    marked = {**config, "quantization_config": {"quant_method": "qkern", "file": _manifest.NAME}}
    return (json.dumps(marked, indent=2, sort_keys=True) + "\n").encode()
