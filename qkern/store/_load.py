# SPDX-License-Identifier: Apache-2.0
"""qkern.load: a saved folder into a model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qkern.errors import FormatError
from qkern.formats._check import _check_numbers as check_numbers
from qkern.model import replace_module
from qkern.nn._base import Configured, QuantizedModule
from qkern.store import _manifest, _skeleton
from qkern.store._manifest import Manifest
from qkern.store._safetensors import TensorFolder

_NAMED = 12  # names that an error lists of each kind


def load(
    model_or_factory: torch.nn.Module | Callable[[], torch.nn.Module] | None,
    folder: str | os.PathLike,
    *,
    strict: bool = True,
    device: Any = None,
) -> torch.nn.Module:
    """The model of a folder that `qkern.save` or `qkern quantize` wrote.

    `model_or_factory` is a model, on the CPU, a GPU or the meta device, with float layers or
    quantized ones; or a function that makes one, which is called so that its parameters take no
    memory; or None: the transformers class that the folder's config.json names. Layers become
    those that were saved, tensors are assigned and have the dtypes that were saved. What a function
    made is returned in evaluation mode.

    With `strict` the tensors of the folder and of the model must be the same, by name and shape.
    Without, what only one of them has is left out, as long as no tensor remains without numbers.
    If anything is wrong the error lists it and the model is as it was.
    """
    path = Path(folder)
    manifest = Manifest.read(path)
    made = not isinstance(model_or_factory, torch.nn.Module)
    with manifest.open(path) as tensors:
        if model_or_factory is None:
            model_or_factory = _skeleton.transformers_factory(path)[1]
        if isinstance(model_or_factory, torch.nn.Module):
            model = model_or_factory
        elif callable(model_or_factory):
            model = _skeleton.build(model_or_factory)
        else:
            raise TypeError(
                "A model, a function that makes one, or None was expected, but "
                f"{type(model_or_factory).__name__} came."
            )
        target = None if device is None else torch.device(device)
        loading = _Loading(model, path, manifest, tensors, target)
        loading.match(strict, made)
        loading.read()
    loaded = loading.commit()
    return loaded.eval() if made else loaded


def modules_of(manifest: Manifest, tensors: TensorFolder) -> Iterator[tuple[str, Configured]]:
    """The quantized modules of a folder with their numbers, one after another."""
    sources = manifest.sources()
    for name, facts in manifest.modules.items():
        module = _manifest.rebuild(name, facts)
        state = {key: sources.get(_joined(name, key)) for key in [*module.state_dict(), "perm"]}
        values = {key: tensors.read(source) for key, source in state.items() if source}
        try:
            module.load_state_dict(values, assign=True)
        except RuntimeError as error:
            raise FormatError(f"The module {name!r}: {error}") from None
        yield name, module


@dataclass
class _Loading:
    model: torch.nn.Module
    folder: Path
    manifest: Manifest
    tensors: TensorFolder
    device: torch.device | None

    places: dict[str, torch.nn.Module] = field(init=False)  # every module of the model
    sources: dict[str, str] = field(init=False)  # saved tensor by the name of the model's state
    twins: dict[int, str] = field(init=False)  # the same by the id of the model's tensor
    modules: dict[str, Configured] = field(default_factory=dict)  # those of ours, by every place
    # Tensors of the model's own modules that come from the folder: (module, word, saved name).
    wanted: list[tuple[torch.nn.Module, str, str]] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = dict(self.model.named_modules(remove_duplicate=False))
        self.sources = self.manifest.sources()
        # A name that the folder lacks may be another name of a tensor that it has.
        named = [
            (_joined(name, word), tensor)
            for name, module in self.places.items()
            for word, tensor in [*module._parameters.items(), *module._buffers.items()]
        ]
        self.twins = {id(t): self.sources[full] for full, t in named if full in self.sources}

    # ---- does it fit? ----

    def match(self, strict: bool, made: bool) -> None:
        """Finds what goes where; an error with all that is wrong."""
        for name, facts in self.manifest.modules.items():
            self.modules[name] = _manifest.rebuild(name, facts)
        for place, owner in self.manifest.shared.items():
            self.modules[place] = self.modules[owner]
        self._check_ties()
        problems = _Problems()
        expected: set[str] = set()
        for name, module in self.modules.items():
            if name in self.places:
                why = _misfit(self.places[name], module, made)
                problems.misfits += [f"{name or 'the model'} {why}"] if why else []
            expected |= self._expected_of(name, module)
        problems.missing += sorted(expected - self.sources.keys())
        problems.empty += problems.missing
        for name, place_module in self.places.items():
            if not self._within_ours(name):
                expected |= self._match_own(name, place_module, problems)
        problems.unexpected += sorted(self.sources.keys() - expected)
        problems.unexpected += [
            f"{name} (a {type(m).__name__})"
            for name, m in self.modules.items()
            if name not in self.places
        ]
        problems.unfilled += [
            name for name in _skeleton.leftovers(self.model) if not self._within_ours(name)
        ]
        problems.raise_any(self.folder, strict, made)

    def _within_ours(self, name: str) -> bool:
        words = name.split(".")
        return "" in self.modules or any(
            ".".join(words[:i]) in self.modules for i in range(1, len(words) + 1)
        )

    def _expected_of(self, name: str, module: Configured) -> set[str]:
        keys = {_joined(name, key) for key in module.state_dict()}
        for inner, part in module.named_modules(prefix=name):
            # A permutation of the columns is there or not; the config does not say.
            if isinstance(part, QuantizedModule) and _joined(inner, "perm") in self.sources:
                keys.add(_joined(inner, "perm"))
        return keys

    def _match_own(self, name: str, module: torch.nn.Module, problems: _Problems) -> set[str]:
        expected = set()
        hidden = module._non_persistent_buffers_set
        for word, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or word in hidden:
                continue
            full = _joined(name, word)
            source = self.sources.get(full) or self.twins.get(id(tensor))
            if source is None:
                problems.missing.append(full)
                problems.empty += [full] if tensor.is_meta else []
                continue
            expected.add(full)
            saved = self.tensors.meta(source)
            if saved.shape != tensor.shape:
                problems.misfits.append(
                    f"{full} has the shape {tuple(saved.shape)}, not {tuple(tensor.shape)}"
                )
            elif saved.is_floating_point() != tensor.is_floating_point():
                problems.misfits.append(f"{full} is {saved.dtype}, not {tensor.dtype}")
            self.wanted.append((module, word, source))
        return expected

    def _check_ties(self) -> None:
        for name, owner in self.manifest.tied_weights.items():
            pair = [self._quantized(name), self._quantized(owner)]
            kinds = {(part.format, part.shape) for part in pair if part is not None}
            if None in pair or len(kinds) != 1:
                raise FormatError(
                    f"{self.folder} says that {name!r} and {owner!r} share one weight, "
                    "but they are not two quantized modules of one format and shape."
                )

    def _quantized(self, name: str) -> QuantizedModule | None:
        """The part of one of the new modules that has this name."""
        for place in self.manifest.modules:
            if name == place or not place or name.startswith(f"{place}."):
                inner = name[len(place) :].removeprefix(".")
                part = dict(self.modules[place].named_modules()).get(inner)
                if isinstance(part, QuantizedModule):
                    return part
        return None

    # ---- reading ----

    def read(self) -> None:
        """All tensors, each once; the model is not touched."""
        for name in self.manifest.modules:
            if name in self.places:
                self._fill(name, self.modules[name])
        for name, owner in self.manifest.tied_weights.items():
            part, other = self._quantized(name), self._quantized(owner)
            assert part is not None and other is not None
            part.tie_(other)
        for module, word, source in self.wanted:
            old = (module._parameters if word in module._parameters else module._buffers)[word]
            assert old is not None
            self._value(source, self.device or _real(old.device))

    def _value(self, source: str, device: torch.device) -> torch.Tensor:
        if source not in self.values:
            self.values[source] = self.tensors.read(source).to(device)
        return self.values[source]

    def _fill(self, name: str, module: Configured) -> None:
        old = self.places[name]
        first = next(iter([*old.parameters(), *old.buffers()]), None)
        device = self.device or _real(torch.device("cpu") if first is None else first.device)
        for word, parameter in module.named_parameters():
            twin = dict(old.named_parameters()).get(word)
            parameter.requires_grad_(twin is not None and twin.requires_grad)
        state = {
            key[len(name) :].removeprefix("."): self._value(self.sources[key], device)
            for key in self._expected_of(name, module)
        }
        try:
            module.load_state_dict(state, assign=True)
            for part in module.modules():
                if isinstance(part, QuantizedModule):
                    _check_numbers_of(part)
        except (RuntimeError, FormatError) as error:
            raise FormatError(f"The module {name!r} of {self.folder}: {error}") from None
        module.train(old.training)

    # ---- doing it ----

    def commit(self) -> torch.nn.Module:
        """Changes the model."""
        made: dict[str, torch.nn.Parameter] = {}
        for module, word, source in self.wanted:
            value, old = self.values[source], module._parameters.get(word)
            if old is None:
                module._buffers[word] = value
                continue
            if source not in made:
                grad = old.requires_grad and value.is_floating_point()
                made[source] = torch.nn.Parameter(value, grad)
            module._parameters[word] = made[source]
        for name, ours in self.modules.items():
            if name and name in self.places:
                replace_module(self.model, name, ours)
        if self.device is not None:
            self.model.to(self.device)
        if "" not in self.modules:
            return self.model
        # The model is itself a quantized module: it stays the same object.
        if type(self.model) is type(self.modules[""]):
            self.model.__dict__.update(self.modules[""].__dict__)
            return self.model
        return self.modules[""]


@dataclass
class _Problems:
    """What does not fit, by kind."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # of the missing: those that have no numbers
    unfilled: list[str] = field(default_factory=list)  # never saved, and without numbers

    def raise_any(self, folder: Path, strict: bool, made: bool) -> None:
        missing = self.missing if strict else self.empty
        unexpected = self.unexpected if strict else []
        sentences = []
        if missing:
            sentences.append(f"the folder lacks {_listed(missing)}")
        if unexpected:
            sentences.append(f"the model has no place for {_listed(unexpected)}")
        if self.misfits:
            sentences.append(f"they disagree about {_listed(self.misfits)}")
        if sentences:
            raise FormatError(
                f"The folder {folder} does not fit the model, which is as it was: "
                + "; ".join(sentences)
                + "."
            )
        if self.unfilled:
            cure = (
                "the function puts them there itself; leave the device to qkern.load"
                if made
                else "give qkern.load a function that makes the model in place of the model"
            )
            raise FormatError(
                f"The model has tensors on the meta device that are never saved, so that nothing "
                f"can fill them: {_listed(self.unfilled)}. The model is as it was; {cure}."
            )


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _joined(name: str, word: str) -> str:
    return f"{name}.{word}" if name else word


def _check_numbers_of(module: QuantizedModule) -> None:
    parts, (*stack, _, k) = module.parts(), module.shape
    for e in range(math.prod(stack)):
        one = {name: part[e] for name, part in parts.items()} if stack else parts
        check_numbers(module.format, one, k)


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


def _misfit(old: torch.nn.Module, new: Configured, made: bool) -> str | None:
    """Why the saved module cannot take this place: their sizes differ."""
    if old is new or isinstance(old, type(new)):
        pairs = [(old.config(), new.config())] if isinstance(old, Configured) else []
        differing = {
            key: (theirs[key], value)
            for theirs, mine in pairs
            for key, value in mine.items()
            if key not in ("format", "compute_dtype", "dtype") and theirs.get(key) != value
        }
    else:
        differing = {}
        for key, value in new.config().items():
            theirs = getattr(old, key, None)
            if isinstance(theirs, (int, tuple)) and not isinstance(theirs, bool):
                value = tuple(value) if isinstance(value, list) else value
                if theirs != value:
                    differing[key] = (theirs, value)
    if differing:
        told = ", ".join(f"{key} {new} and not {old}" for key, (old, new) in differing.items())
        return f"(a {type(new).__name__}), which has {told}"
    return None
