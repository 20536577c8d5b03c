# SPDX-License-Identifier: Apache-2.0
"""quantize_: the layers of a model replaced by quantized ones, in place."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from qkern import nn
from qkern._quantize import METHODS
from qkern.errors import QkernError, UnsupportedError
from qkern.formats import Format, parse_format
from qkern.report import ModuleReport, Report

_Formats = Format | str | Mapping[str, Format | str | None]

# What is replaced by what. Subclasses are left alone: they may use their weight in their own way.
_REPLACEMENTS: dict[type[torch.nn.Module], type[nn.QuantizedModule]] = {
    torch.nn.Linear: nn.Linear,
    torch.nn.Embedding: nn.Embedding,
    torch.nn.Conv1d: nn.Conv1d,
    torch.nn.Conv2d: nn.Conv2d,
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class _Plan:
    """What is to become of one module."""

    module: torch.nn.Module
    names: list[str]  # every place that it has in the model
    format: Format | None = None
    reason: str | None = None  # why it is left alone
    meant: bool = False  # strict: it must be quantized
    exact: bool = False  # a pattern without wildcards named it
    broad: bool = False  # only the pattern of all modules did
    result: nn.Configured | None = None
    error: float | None = None
    owner: _Plan | None = None  # the plan whose weight this one has too

    @property
    def name(self) -> str:
        return self.names[0]


def quantize_(
    model: torch.nn.Module,
    fmt: _Formats,
    *,
    skip: Sequence[str] = ("lm_head",),
    method: str = "rtn",
    calibration: Any = None,
    strict: bool = False,
    progress: bool = True,
) -> Report:
    """Replaces the layers of a model by quantized ones: torch.nn.Linear, Embedding, Conv1d and
    Conv2d by those of qkern.nn, the Conv1D of Hugging Face transformers by qkern.nn.Linear, and
    their stacks of experts by qkern.nn.Experts.

    An embedding is replaced where a pattern other than "*" names it, or a layer that is quantized
    shares its weight: models often read the weights of embeddings as tensors.

    `fmt` is one format (or its text), or a dict of name patterns to formats, the first match
    counting and None leaving the module alone. A pattern ("*" and "?" as in file names) is
    compared with the whole name and with its last parts, so that "lm_head" also matches
    "model.lm_head". `skip` holds patterns of modules that stay as they are.

    Everything else stays too, and the report says why. With `strict` a module that was meant and
    could not be quantized, or a pattern that matches nothing, is an error. The model changes only
    when all its layers have been quantized.

    Modules that share their weight share it afterwards, in one format or not at all: with the
    default `skip` an embedding that is tied to lm_head stays a float table with it, and `skip=()`
    quantizes both as one weight.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    known = _replacement(model)
    if known is not None:
        raise ValueError(
            f"The model itself is a {type(model).__name__}, which cannot be replaced in place; "
            f"use qkern.nn.{known.__name__}.from_float."
        )
    check_method(method)
    if calibration is not None:
        raise UnsupportedError(f"Method {method!r} takes no calibration data.")
    chooser = _Chooser(fmt, skip)
    plans = _plans(model, chooser)
    _tie(plans)
    for plan in _with_progress([p for p in plans if p.format and not p.owner], progress):
        _quantize(plan, method)
    _settle_ties(plans)
    if strict:
        _require_all(plans, chooser)
    rows = tuple(_rows(plans))
    _swap(model, plans)
    return Report(rows)


def check_method(method: str) -> None:
    if method not in METHODS:
        raise UnsupportedError(f"There is no method {method!r}; there are: {', '.join(METHODS)}.")


# ---- which module gets which format ----


@dataclass
class _Chooser:
    fmt: _Formats
    skip: Sequence[str]
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if isinstance(self.skip, str):
            raise TypeError(
                f"skip must be a sequence of patterns, but the text {self.skip!r} came."
            )
        if isinstance(self.fmt, Mapping):
            self.patterns = {
                pattern: None if value is None else parse_format(value)
                for pattern, value in self.fmt.items()
            }
        else:
            self.patterns = {"*": parse_format(self.fmt)}

    def choose(self, names: list[str]) -> tuple[Format | None, str | None, str]:
        """A format or why there is none, and the pattern that decided."""
        for pattern in self.skip:
            if any(_matches(name, pattern) for name in names):
                return None, f"skipped by name ({pattern!r})", pattern
        for pattern, fmt in self.patterns.items():
            if any(_matches(name, pattern) for name in names):
                self.used.add(pattern)
                reason = None if fmt else f"left alone by the pattern {pattern!r}"
                return fmt, reason, pattern
        return None, "no pattern matches its name", ""


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _plans(model: torch.nn.Module, chooser: _Chooser, on_meta: bool = False) -> list[_Plan]:
    """One plan for each module that has parameters or buffers of its own. `on_meta`: their numbers
    come later."""
    plans: dict[int, _Plan] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in _own_tensors(module)):
            plans.setdefault(id(module), _Plan(module, [])).names.append(name)
    for plan in plans.values():
        plan.format, plan.reason, pattern = chooser.choose(plan.names)
        plan.exact = plan.format is not None and not set("*?[") & set(pattern)
        plan.broad = plan.format is not None and pattern == "*"
        quantized = isinstance(plan.module, nn.Configured)
        replaceable = _replacement(plan.module) is not None
        known = replaceable or isinstance(plan.module, tuple(_REPLACEMENTS))
        known = known and not (plan.broad and _is_table(plan.module))
        plan.meant = plan.format is not None and not quantized and (known or plan.exact)
        obstacle = _obstacle(plan.module, on_meta)
        # What the name decides is said only of modules that could be quantized.
        if obstacle and (plan.format or not replaceable):
            plan.format, plan.reason = None, obstacle
    return list(plans.values())


def _own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _replacement(module: torch.nn.Module) -> type[nn.QuantizedModule] | type[nn.Experts] | None:
    """The class of the quantized module that takes this one's place."""
    if nn.linear.is_transposed(module):
        return nn.Linear
    if _is_stack(module) and nn.Experts.obstacle(module) is None:
        return nn.Experts
    return _REPLACEMENTS.get(type(module))


def _is_stack(module: torch.nn.Module) -> bool:
    """Whether it holds the weights of many experts in its own parameters."""
    return any(p.dim() == 3 for p in module.parameters(recurse=False)) and hasattr(
        module, "num_experts"
    )


def _obstacle(module: torch.nn.Module, on_meta: bool) -> str | None:
    """Why this module cannot be quantized whatever the format is."""
    kind = type(module).__name__
    if isinstance(module, nn.QuantizedModule):
        return f"it is quantized already ({module.format})"
    replacement = _replacement(module)
    if replacement is None:
        base = next((b.__name__ for b in _REPLACEMENTS if isinstance(module, b)), None)
        if base:
            return f"{kind} is a subclass of {base} and may use its weight in its own way"
        return nn.Experts.obstacle(module) if _is_stack(module) else f"no quantized {kind} is known"
    parameters = {name for name, _ in module.named_parameters(recurse=False)}
    if not _WEIGHTS[replacement] <= parameters <= _WEIGHTS[replacement] | {"bias"}:
        return "its weight is computed from other parameters"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "it has hooks, which a replacement would lose"
    if not on_meta and any(p.is_meta for p in module.parameters(recurse=False)):
        return "its weight is on the meta device and has no numbers"
    return None


_WEIGHTS: dict[type, set[str]] = {
    **{kind: {"weight"} for kind in _REPLACEMENTS.values()},
    nn.Experts: {"gate_up_proj", "down_proj"},
}


# Other code often reads the weight of an embedding as a tensor, which no report could foresee.
_UNNAMED = (
    "an embedding is quantized where a pattern names it, as in {'embed*': 'int8', '*': 'int4'}, "
    "or a layer that is quantized shares its weight"
)


def _is_table(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Embedding)


def _tie(plans: list[_Plan]) -> None:
    """Modules that share their weight get one quantized weight, or are all left alone."""
    users: dict[int, list[_Plan]] = {}
    for plan in plans:
        for parameter in plan.module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(plan)
    for plan in plans:
        if plan.format is None or plan.owner is not None:
            continue
        weights = _WEIGHTS[_replacement(plan.module)]  # type: ignore[index]
        group = [p for name in weights for p in users[id(getattr(plan.module, name))]]
        others = [p for p in group if p is not plan]
        if all(p.broad and _is_table(p.module) for p in group):
            for p in group:
                p.format, p.reason = None, _UNNAMED
            continue
        same = all(p.format == plan.format for p in others) and _one_matrix([plan, *others])
        for p in others if same else ():
            p.owner = plan
        if others and not same:
            # A module that stays because of what a name says of another was not meant either.
            by_name = any(p.format is None and _replacement(p.module) for p in others)
            for p in group:
                if p.format is not None:
                    names = (f"{o.name} ({type(o.module).__name__})" for o in group if o is not p)
                    p.format, p.reason = None, f"its weight is tied to {', '.join(names)}"
                    p.meant = p.meant and (p.exact or not by_name)


def _one_matrix(plans: list[_Plan]) -> bool:
    """Whether the modules read the weight that they share as one and the same matrix."""
    if len(plans) == 1:
        return True
    views = set()
    for plan in plans:
        kind = _replacement(plan.module)
        if kind is None or not issubclass(kind, nn.QuantizedModule):
            return False
        try:
            matrix = kind.matrix_of(plan.module)
        except QkernError:
            return False
        views.add((matrix.data_ptr(), matrix.shape, matrix.stride()))
    return len(views) == 1


def _settle_ties(plans: list[_Plan]) -> None:
    for plan in plans:
        owner = plan.owner
        if owner is None:
            continue
        plan.format, plan.reason, plan.error = owner.format, owner.reason, owner.error
        if owner.result is None:
            continue
        if _is_one_module(plan.module, owner.module):
            plan.result, plan.reason = owner.result, f"one module with {owner.name}"
            continue
        kind = _replacement(plan.module)
        assert isinstance(owner.result, nn.QuantizedModule)
        assert kind is not None and issubclass(kind, nn.QuantizedModule)
        plan.result = kind.like(plan.module, owner.result.weight).tie_(owner.result)
        plan.reason = f"one weight with {owner.name}"


def _is_one_module(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return type(a) is type(b) is torch.nn.Linear and a.bias is b.bias


def _require_all(plans: list[_Plan], chooser: _Chooser) -> None:
    failures = [f"{p.name}: {p.reason}" for p in plans if p.meant and p.result is None]
    failures += [
        f"the pattern {pattern!r} matches no module"
        for pattern in chooser.patterns
        if pattern not in chooser.used
    ]
    if failures:
        raise UnsupportedError(
            "strict=True, and these could not be quantized (the model is as it was): "
            + "; ".join(failures)
        )


# ---- doing it ----


def _quantize(plan: _Plan, method: str) -> None:
    assert plan.format is not None
    module: Any = plan.module
    kind = _replacement(module)
    assert kind is not None
    try:
        plan.result = kind.from_float(module, plan.format, method=method)
    except QkernError as error:
        plan.format, plan.reason = None, str(error)
        return
    change = size = 0.0
    for weight, quantized in _pairs(kind, module, plan.result):
        weight = weight.float()
        change += float((quantized.dequantize().to(weight.device) - weight).square().sum())
        size += float(weight.square().sum())
    plan.error = math.sqrt(change / size) if change else 0.0


def _pairs(kind: Any, module: Any, result: Any) -> Iterator[tuple[torch.Tensor, Any]]:
    """Float matrices and what became of them, one at a time."""
    if kind is not nn.Experts:
        yield kind.matrix_of(module), result.weight
        return
    for name in ("gate_up_proj", "down_proj"):
        yield from zip(getattr(module, name).detach(), getattr(result, name).weight, strict=True)


def _with_progress(plans: list[_Plan], progress: bool) -> Iterable[_Plan]:
    """The plans behind a progress bar, where one is wished, possible and seen."""
    if not (progress and sys.stderr.isatty()):
        return plans
    try:
        from tqdm import tqdm
    except ImportError:
        return plans
    return tqdm(plans, desc="quantize", unit="layer")


def _swap(model: torch.nn.Module, plans: list[_Plan]) -> None:
    for plan in plans:
        for name in plan.names if plan.result is not None else ():
            assert plan.result is not None
            replace_module(model, name, plan.result)


def replace_module(model: torch.nn.Module, name: str, new: torch.nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    parent._modules[child] = new
    if isinstance(parent, torch.nn.TransformerEncoderLayer):
        # Its fused path takes the weights of its layers as tensors; this turns it off.
        parent.activation_relu_or_gelu = 0


def _rows(plans: list[_Plan]) -> Iterator[ModuleReport]:
    old: set[int] = set()
    new: set[int] = set()
    for plan in plans:
        before = _new_bytes_of(_own_tensors(plan.module), old)
        modules = [plan.module] if plan.result is None else list(plan.result.modules())
        after = _new_bytes_of((t for module in modules for t in _own_tensors(module)), new)
        row = ModuleReport(plan.name, type(plan.module).__name__, before, after)
        if plan.result is None:
            yield replace(row, reason=plan.reason)
        elif plan.owner is not None:
            yield replace(
                row,
                format=str(plan.format),
                error=plan.error,
                reason=plan.reason,
            )
        else:
            weights = [m.weight for m in modules if isinstance(m, nn.QuantizedModule)]
            yield replace(
                row,
                format=str(plan.format),
                error=plan.error,
                weights=sum(math.prod(weight.shape) for weight in weights),
                weight_bytes=sum(weight.nbytes for weight in weights),
            )


def _new_bytes_of(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the tensors that were not seen before."""
    fresh = {id(t): t.numel() * t.element_size() for t in tensors if id(t) not in seen}
    seen.update(fresh)
    return sum(fresh.values())
