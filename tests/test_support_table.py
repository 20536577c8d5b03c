# SPDX-License-Identifier: Apache-2.0
"""The README's support table says what the list of kernels says."""

from __future__ import annotations

from pathlib import Path

import support_table

from qkern import _core

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_list_is_read_as_the_core_reads_it() -> None:
    facts = ("isa", "weights", "activations")
    listed = {r["name"]: [r[f] for f in facts] for r in support_table.registry()}
    built = {r["name"]: [r[f] for f in facts] for r in _core.kernels() if r["op"] == "linear"}
    assert listed.items() >= built.items()
    others = {listed[name][0] for name in listed.keys() - built.keys()}
    assert not others & {facts[0] for facts in built.values()}


def test_the_readme_has_the_table() -> None:
    text = README.read_text()
    table = text.split(support_table.BEGIN)[1].split(support_table.END)[0]
    assert table.strip() == support_table.table(), "run python bench/support_table.py --write"
