# SPDX-License-Identifier: Apache-2.0
"""Loops that are not chosen, per version of triton and per architecture: those that the compiler
gave local memory though they have room (mostly a few bytes, for one more block at a time), or could
not compile. Found and written by tests/triton_aot_all.py."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

PATH = Path(__file__).with_name("excluded.json")
Version = tuple[int, int]


def parsed(version: str) -> Version:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def installed() -> str:
    """The version of triton, which is not loaded for that where its metadata says it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return str(importlib.import_module("triton").__version__)


def like(version: Version, known: Iterable[Version]) -> Version:
    """The newest of the versions that were compiled with and are not newer, or the oldest."""
    known = sorted(known)
    return max((v for v in known if v <= version), default=known[0])


def of_version(version: Version) -> dict[str, frozenset[str]]:
    """Names of loops per architecture (compute capability times 10; 0 is AMD)."""
    found = json.loads(PATH.read_text(encoding="utf-8"))
    text = {parsed(v): v for v in found}[like(version, map(parsed, found))]
    return {arch: frozenset(names) for arch, names in found[text].items()}


@lru_cache(maxsize=1)
def loops() -> dict[str, frozenset[str]]:
    """For the triton that is installed, or where none is, for the newest."""
    try:
        version = parsed(installed())
    except ImportError:
        version = (999, 0)
    return of_version(version)
