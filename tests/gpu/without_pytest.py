# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of this folder where pytest is not installed.

    python tests/gpu/without_pytest.py [FOLDER]

A module takes pytest's name and has what these tests use of it, nothing more: marks, parametrize,
param, skip, importorskip, raises, and a fixture `cuda_backend` of conftest.py around every test.
Ends as pytest does, with a line that counts; status 0 if a test passed or was skipped and none
failed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

MOST_FAILURES = 30


class Skipped(Exception):
    """A test, or a whole file, does not apply here."""


class Values(NamedTuple):
    """One case of parametrize, from pytest.param."""

    values: tuple[Any, ...]


class Marks:
    gpu = slow = None

    @staticmethod
    def parametrize(names: str, cases: Any) -> Callable[[Any], Any]:
        def mark(function: Any) -> Any:
            function.axes = [*getattr(function, "axes", ()), (names.split(","), list(cases))]
            return function

        return mark


def skip(reason: str) -> None:
    raise Skipped(reason)


def importorskip(name: str, reason: str = "") -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(reason or f"{name} is not installed") from error


@contextlib.contextmanager
def raises(kind: type[BaseException], match: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert re.search(match, str(error)), f"{error!r} does not match {match!r}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


def stand_in() -> ModuleType:
    module = ModuleType("pytest")
    vars(module).update(
        mark=Marks,
        param=lambda *values, marks=None: Values(values),
        fixture=lambda **options: lambda function: function,
        skip=skip,
        importorskip=importorskip,
        raises=raises,
    )
    return module


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"plain_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(function: Any) -> Iterator[dict[str, Any]]:
    """The arguments of every case of a test."""
    axes = getattr(function, "axes", [])
    for chosen in itertools.product(*(values for _, values in axes)):
        arguments: dict[str, Any] = {}
        for (names, _), value in zip(axes, chosen, strict=True):
            row = value.values if isinstance(value, Values) else value
            several = row if len(names) > 1 or isinstance(value, Values) else (row,)
            arguments |= zip((name.strip() for name in names), several, strict=True)
        yield arguments


def run(folder: Path) -> dict[str, int]:
    counts = dict.fromkeys(("failed", "passed", "skipped"), 0)
    around = contextlib.contextmanager(load(folder / "conftest.py").cuda_backend)
    for path in sorted(folder.glob("test_*.py")):
        try:
            module = load(path)
        except Skipped as reason:
            print(f"SKIPPED {path.name}: {reason}")
            counts["skipped"] += 1
            continue
        for name, function in list(vars(module).items()):
            if not name.startswith("test_"):
                continue
            for arguments in cases(function):
                if counts["failed"] >= MOST_FAILURES:
                    return counts
                counts[outcome(f"{path.name}::{name}", function, arguments, around)] += 1
    return counts


def outcome(name: str, function: Any, arguments: dict[str, Any], around: Any) -> str:
    label = name + (f"[{'-'.join(map(str, arguments.values()))}]" if arguments else "")
    try:
        with around():
            function(**arguments)
    except Skipped as reason:
        print(f"SKIPPED {label}: {reason}")
        return "skipped"
    except Exception as error:
        traceback.print_exc(limit=-4, file=sys.stdout)
        print(f"FAILED {label}: {str(error)[:200] or type(error).__name__}", flush=True)
        return "failed"
    return "passed"


def main() -> int:
    begin = time.monotonic()
    sys.modules["pytest"] = stand_in()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    counts = run(folder)
    text = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"{text or 'no tests ran'} in {time.monotonic() - begin:.2f}s, without pytest")
    return 1 if counts["failed"] or not sum(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
