# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkern import _core


@pytest.fixture(scope="session", autouse=True)
def away_from_the_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that tests start must find the installed package, not the folder of its sources,
    which Python looks into first when it is the working directory."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest ones first: at the end, one process would wait for the other."""
    items.sort(key=lambda item: "test_triton_interpreter" not in item.nodeid)


ISAS = ("scalar", "avx2", "avx512", "avx512vnni", "avx512amx", "neon", "neondot", "neoni8mm")


def usable_isas() -> list[str]:
    """The levels that this machine has, by trying each."""
    found = []
    for isa in ISAS:
        try:
            _core.set_isa(isa)
        except NotImplementedError:
            continue
        found.append(isa)
    _core.set_isa(None)
    return found


@pytest.fixture(params=usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, forced for the test."""
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and texts made by others, beside the checkout; not part of the package."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real test data is not there: {folder.name} beside the checkout")
    return folder
