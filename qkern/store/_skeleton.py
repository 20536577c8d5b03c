# SPDX-License-Identifier: Apache-2.0
"""Models without weights: parameters on the meta device, everything else as it should be.

torch.device("meta") would put buffers there too. Those that are computed by the constructor and
not saved (rotary frequencies, position ids) would then have no numbers, and nobody would notice
before the first call. So only parameters go there, each at the moment it is given to its module,
which is before it is initialized. A parameter made by torch.empty never touches memory.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from qkern.errors import FormatError, UnsupportedError
from qkern.store._safetensors import parse_json

Factory = Callable[[], torch.nn.Module]


def build(factory: Factory) -> torch.nn.Module:
    with _parameters_on_meta():
        model = factory()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            "A torch.nn.Module, or a function that makes one, was expected; "
            f"{getattr(factory, '__name__', factory)!s} made a {type(model).__name__}."
        )
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    thread = threading.get_ident()
    replaced: Any = WeakIdKeyDictionary()  # one parameter in two places stays one

    def to_meta(module: Any, name: str, parameter: Any) -> Any:
        if threading.get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        if parameter not in replaced:
            twin = torch.empty_like(parameter, device="meta", requires_grad=False)
            replaced[parameter] = torch.nn.Parameter(twin, parameter.requires_grad)
        return replaced[parameter]

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def leftovers(model: torch.nn.Module) -> list[str]:
    """Tensors on the meta device that a state dict does not have: nothing will fill them."""
    found = []
    for name, module in model.named_modules():
        hidden = {n: module._buffers[n] for n in module._non_persistent_buffers_set}
        for word, tensor in {**vars(module), **hidden}.items():
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                found.append(f"{name}.{word}".lstrip("."))
    return found


# ---- Hugging Face folders ----


def transformers_factory(folder: Path) -> tuple[str, Factory]:
    """The class that config.json names, and a function that makes one without weights."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, which would name the model's class.")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"The model's class is that of {path}, which needs transformers ({error}): "
            "pip install transformers, or give a function that makes the model."
        ) from None
    facts = parse_json(path.read_bytes(), str(path))
    named = facts.get("architectures")
    kind = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    found = getattr(transformers, kind, None) if kind else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnsupportedError(
            f"{path} names the class {kind!r}, which transformers {transformers.__version__} does "
            "not have; give a function that makes the model."
        )
    assert kind is not None
    facts.pop("quantization_config", None)
    cls: Any = found
    config = cls.config_class.from_dict(facts)

    # from_pretrained makes models under this dtype, and buffers take it.
    dtype = getattr(config, "dtype", None)

    def make() -> torch.nn.Module:
        before = torch.get_default_dtype()
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            torch.set_default_dtype(dtype)
        try:
            model = cls(config)
        finally:
            torch.set_default_dtype(before)
        if (folder / "generation_config.json").is_file() and hasattr(model, "generation_config"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return model

    return kind, make


# Names of float matrices that are no linear layers, in models that only their files describe.
_NO_LINEAR = re.compile(r"(^|[._])(embed\w*|wte|wpe|shared|ln\w*|\w*norm\w*)[._]", re.IGNORECASE)


def from_names(tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A model that only the names and shapes of its tensors (on meta) describe.

    A float matrix `x.weight` is the weight of a torch.nn.Linear (with the bias `x.bias` where
    there is one of its length), unless a part of its name is one that embeddings and norms have.
    All else are plain parameters.
    """
    root = torch.nn.Module()
    linears = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight")
        and tensor.dim() == 2
        and tensor.is_floating_point()
        and not _NO_LINEAR.search(name)
    ]
    for name in linears:
        rows, columns = tensors[f"{name}.weight"].shape
        bias = tensors.get(f"{name}.bias")
        has_bias = bias is not None and tuple(bias.shape) == (rows,)
        parent, child = _parent(root, name)
        parent.add_module(child, torch.nn.Linear(columns, rows, has_bias, device="meta"))
    for name, tensor in tensors.items():
        parent, child = _parent(root, name)
        if child not in parent._parameters:
            frozen = torch.nn.Parameter(tensor, requires_grad=False)
            parent.register_parameter(child, frozen)
    return root


def _parent(root: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    *path, last = name.split(".")
    module = root
    for word in path:
        if not word or word in module._parameters:
            raise FormatError(f"{name!r} is no name that a module of torch can have.")
        if word not in module._modules:
            module.add_module(word, torch.nn.Module())
        child = module._modules[word]
        assert child is not None
        module = child
    return module, last
