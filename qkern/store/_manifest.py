# SPDX-License-Identifier: Apache-2.0
"""qkern.json: what is in a saved folder beside the numbers.

{"format": "qkern", "version": 1, "qkern_version": "0.1.0",
 "modules": {"layers.0.up": {"class": "Linear", "format": "int4-g64", "shape": [128, 64],
                             "config": {"in_features": 64, ...}}},
 "shared": {}, "tied_weights": {}, "tied_tensors": {"head.weight": "embed.weight"},
 "files": {"layers.0.up.codes": "model.safetensors", ...}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkern.errors import FormatError
from qkern.formats import parse_format
from qkern.store._folder import set_aside
from qkern.store._safetensors import TensorFolder, parse_json
from qkern.truth import version

if TYPE_CHECKING:
    import torch

    from qkern.nn._base import Configured

NAME = "qkern.json"
PARTS = ("codes", "scales", "zeros", "codebook", "perm", "global_scale")
VERSION = 1  # of the JSON; a reader refuses those above its own
_SIZE_LIMIT = 100_000_000


@dataclass
class Manifest:
    """Names of tensors and modules are those of the model's state dict."""

    # Outermost quantized modules: class in qkern.nn and what its from_config takes. The format and
    # the shape of the weight are told for readers, where the module has one weight.
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)  # place of a module: its first place
    tied_weights: dict[str, str] = field(default_factory=dict)  # module: one with its weight
    tied_tensors: dict[str, str] = field(default_factory=dict)  # tensor: the one that is saved
    files: dict[str, str] = field(default_factory=dict)  # tensor: file

    def to_json(self) -> bytes:
        head = {"format": "qkern", "version": VERSION, "qkern_version": version()}
        return (json.dumps({**head, **asdict(self)}, indent=1) + "\n").encode()

    def index(self, total: int) -> bytes:
        """The list of shards in the form that Hugging Face tools read."""
        index = {"metadata": {"total_size": total}, "weight_map": self.files}
        return (json.dumps(index, indent=1) + "\n").encode()

    def file_names(self) -> list[str]:
        return sorted(set(self.files.values()))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        path = folder / NAME
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no folder that qkern.save wrote: {_why(folder)}.")
        with open(path, "rb") as file:
            text = file.read(_SIZE_LIMIT + 1)
        if len(text) > _SIZE_LIMIT:
            raise FormatError(f"{path} has more than {_SIZE_LIMIT} bytes, which none needs.")
        return cls._from_dict(parse_json(text, str(path)), path)

    @classmethod
    def _from_dict(cls, data: dict[str, Any], path: Path) -> Manifest:
        number = data.get("version")
        if data.get("format") != "qkern" or type(number) is not int or number < 1:
            raise FormatError(f"{path} does not say that it is of the format 'qkern', version 1.")
        if number > VERSION:
            raise FormatError(
                f"{path} is of version {number}, written by qkern {data.get('qkern_version')!r}; "
                f"this is qkern {version()}, which reads up to version {VERSION}: use a newer one."
            )
        found = cls()
        for name in ("shared", "tied_weights", "tied_tensors", "files"):
            table = data.get(name)
            if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
                raise FormatError(f"{name!r} of {path} must map names to names.")
            setattr(found, name, table)
        modules = data.get("modules")
        if not isinstance(modules, dict):
            raise FormatError(f"'modules' of {path} must map names to descriptions.")
        for name, facts in modules.items():
            facts = facts if isinstance(facts, dict) else {}
            kind, config = facts.get("class"), facts.get("config")
            if not isinstance(kind, str) or not isinstance(config, dict):
                raise FormatError(f"The module {name!r} of {path} lacks a class or a config.")
        found.modules = modules
        found._check_links(path)
        return found

    def _check_links(self, path: Path) -> None:
        for place, owner in self.shared.items():
            if owner not in self.modules or place in self.modules:
                raise FormatError(
                    f"{path}: {place!r} is shared with {owner!r}, which is no module."
                )
        for alias, name in self.tied_tensors.items():
            if name not in self.files or alias in self.files:
                raise FormatError(f"{path}: {alias!r} is tied to {name!r}, which is not saved.")

    def sources(self) -> dict[str, str]:
        """The saved tensor of every name that the state dict of the model has."""
        found = {name: name for name in self.files} | self.tied_tensors
        for module, owner in self.tied_weights.items():
            for part in PARTS:
                if f"{owner}.{part}" in found:
                    found[f"{module}.{part}"] = found[f"{owner}.{part}"]
        for place, owner in self.shared.items():
            prefix = f"{owner}."
            for name in [name for name in found if name.startswith(prefix)]:
                found[f"{place}.{name.removeprefix(prefix)}"] = found[name]
        return found

    def open(self, folder: Path) -> TensorFolder:
        """The tensors; they must be where this says, all of them and no others."""
        tensors = TensorFolder(folder, self.file_names())
        for name, file in self.files.items():
            if name not in tensors or tensors.file_of(name) != file:
                tensors.close()
                raise FormatError(f"{NAME} says that {file} holds {name!r}, but it does not.")
        extra = [name for name in tensors if name not in self.files]
        if extra:
            tensors.close()
            raise FormatError(f"{extra[0]!r} is in {folder}, but {NAME} does not know of it.")
        return tensors


def _why(folder: Path) -> str:
    if folder.is_dir():
        return f"it has no {NAME}"
    aside = set_aside(folder)
    if aside:
        return f"it is not there; an interrupted save left the old one as {aside[0]}, to be renamed"
    return "it is a file" if folder.exists() else "there is nothing"


# ---- modules ----


def outermost(
    model: torch.nn.Module, prefix: str = ""
) -> Iterator[tuple[str, torch.nn.Module, Configured | None]]:
    """(name, module, the same if it is ours) of every place, nothing within ours."""
    from qkern.nn._base import Configured

    ours = model if isinstance(model, Configured) else None
    yield prefix, model, ours
    if ours is None:
        for name, child in model._modules.items():
            if child is not None:
                yield from outermost(child, f"{prefix}.{name}" if prefix else name)


def describe(module: Configured) -> dict[str, Any]:
    from qkern.nn._base import QuantizedModule

    facts: dict[str, Any] = {"class": type(module).__name__, "config": module.config()}
    if isinstance(module, QuantizedModule):
        facts |= {"format": str(module.format), "shape": list(module.shape)}
    return facts


def rebuild(name: str, facts: dict[str, Any]) -> Configured:
    """The module on the meta device."""
    from qkern import nn
    from qkern.nn._base import Configured

    kind = facts["class"]
    cls = getattr(nn, kind) if kind in nn.__all__ else None
    if not (isinstance(cls, type) and issubclass(cls, Configured)):
        raise FormatError(
            f"The module {name!r} is a {kind!r}, a class that qkern.nn does not have."
        )
    try:
        module = cls.from_config(facts["config"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise FormatError(
            f"The module {name!r} cannot be built from its config {facts['config']}: {error}"
        ) from None
    if facts.get("format") is not None:
        told = (parse_format(facts["format"]), tuple(facts.get("shape") or ()))
        if told != (getattr(module, "format", None), tuple(getattr(module, "shape", ()))):
            raise FormatError(f"The format or shape of the module {name!r} contradicts its config.")
    return module
