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
    result: nn.QuantizedModule | None = None
    error: float | None = None
    owner: _Plan | None = None  # the plan whose result takes this place too

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
    """Replaces the torch.nn.Linear layers of a model by qkern.nn.Linear.

    `fmt` is one format (or its text), or a dict of name patterns to formats, the first match
    counting and None leaving the module alone. A pattern ("*" and "?" as in file names) is
    compared with the whole name and with its last parts, so that "lm_head" also matches
    "model.lm_head". `skip` holds patterns of modules that stay as they are.

    Everything else stays too, and the report says why. With `strict` a module that was meant and
    could not be quantized, or a pattern that matches nothing, is an error. The model changes only
    when all its layers have been quantized. Modules that share their weight share it afterwards.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but it is {type(model).__name__}.")
    if type(model) in _REPLACEMENTS:
        name = type(model).__name__
        raise ValueError(
            f"The model itself is a {name}, which cannot be replaced in place; "
            f"use qkern.nn.{name}.from_float."
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

    def choose(self, names: list[str]) -> tuple[Format | None, str | None, bool]:
        """A format or why there is none, and whether a pattern without wildcards named it."""
        for pattern in self.skip:
            if any(_matches(name, pattern) for name in names):
                return None, f"skipped by name ({pattern!r})", False
        for pattern, fmt in self.patterns.items():
            if any(_matches(name, pattern) for name in names):
                self.used.add(pattern)
                reason = None if fmt else f"left alone by the pattern {pattern!r}"
                return fmt, reason, not set("*?[") & set(pattern)
        return None, "no pattern matches its name", False


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
        plan.format, plan.reason, exact = chooser.choose(plan.names)
        quantized = isinstance(plan.module, nn.QuantizedModule)
        known = isinstance(plan.module, tuple(_REPLACEMENTS))
        plan.meant = plan.format is not None and not quantized and (known or exact)
        obstacle = _obstacle(plan.module, on_meta)
        # What the name decides is said only of modules that could be quantized.
        if obstacle and (plan.format or type(plan.module) not in _REPLACEMENTS):
            plan.format, plan.reason = None, obstacle
    return list(plans.values())


def _own_tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _obstacle(module: torch.nn.Module, on_meta: bool) -> str | None:
    """Why this module cannot be quantized whatever the format is."""
    kind = type(module).__name__
    if isinstance(module, nn.QuantizedModule):
        return f"it is quantized already ({module.format})"
    if type(module) not in _REPLACEMENTS:
        base = next((b.__name__ for b in _REPLACEMENTS if isinstance(module, b)), None)
        if base:
            return f"{kind} is a subclass of {base} and may use its weight in its own way"
        return f"no quantized {kind} is known"
    weight = module.weight
    if not isinstance(weight, torch.nn.Parameter) or set(module._parameters) != {"weight", "bias"}:
        return "its weight is computed from other parameters"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "it has hooks, which a replacement would lose"
    if weight.device.type == "meta" and not on_meta:
        return "its weight is on the meta device and has no numbers"
    return None


def _tie(plans: list[_Plan]) -> None:
    """Modules that share their weight are replaced by one module, or all left alone."""
    users: dict[int, list[_Plan]] = {}
    for plan in plans:
        for parameter in plan.module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(plan)
    for plan in plans:
        if plan.format is None or plan.owner is not None:
            continue
        group = users[id(plan.module.weight)]
        same = all(p.format == plan.format and p.module.bias is plan.module.bias for p in group)
        for p in group:
            if same and p is not plan:
                p.owner = plan
            elif not same and p.format is not None:
                others = (f"{o.name} ({type(o.module).__name__})" for o in group if o is not p)
                p.format, p.reason = None, f"its weight is tied to {', '.join(others)}"


def _settle_ties(plans: list[_Plan]) -> None:
    for plan in plans:
        if plan.owner is not None:
            plan.result, plan.error = plan.owner.result, plan.owner.error
            plan.format, plan.reason = plan.owner.format, plan.owner.reason


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
    try:
        plan.result = _REPLACEMENTS[type(module)].from_float(module, plan.format, method=method)
    except QkernError as error:
        plan.format, plan.reason = None, str(error)
        return
    weight = module.weight.detach().float()
    change = torch.linalg.vector_norm(plan.result.weight.dequantize().to(weight.device) - weight)
    plan.error = float(change / torch.linalg.vector_norm(weight)) if change else 0.0


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
        module = plan.module if plan.result is None else plan.result
        before = _new_bytes_of(_own_tensors(plan.module), old)
        after = _new_bytes_of(_own_tensors(module), new)
        row = ModuleReport(plan.name, type(plan.module).__name__, before, after)
        if plan.result is None:
            yield replace(row, reason=plan.reason)
        elif plan.owner is not None:
            yield replace(
                row,
                format=str(plan.format),
                error=plan.error,
                reason=f"one module with {plan.owner.name}",
            )
        else:
            weight = plan.result.weight
            yield replace(
                row,
                format=str(plan.format),
                error=plan.error,
                weights=math.prod(weight.shape),
                weight_bytes=weight.nbytes,
            )


def _new_bytes_of(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the tensors that were not seen before."""
    fresh = {id(t): t.numel() * t.element_size() for t in tensors if id(t) not in seen}
    seen.update(fresh)
    return sum(fresh.values())
