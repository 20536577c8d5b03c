# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel that can be chosen, for every target, and says what came out.

    python tests/triton_aot_all.py [--jobs N] [--targets sm_90,gfx942] [--record FILE]
                                   [--report FILE] [--exclude] [--no-compile]

Takes an hour on two cores. Each result is a line of the record, so that an interrupted run goes on
where it was; a kernel whose source or constants have changed since is compiled again. The report is
a table; the status is 1 where a kernel spills or leaves the limits of the hardware. With --exclude,
loops that spill or do not compile are no longer chosen with this version of triton (and stay so
until a later run finds otherwise; what is chosen instead wants a run of its own).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import triton

from qkern.triton_kernels import configs, excluded
from triton_aot import (
    AMD,
    SPECS,
    TARGETS,
    Loop,
    compiled,
    device_of,
    expert_loops,
    loops,
    name_of,
    other_loops,
)

Facts = dict[str, Any]
LIMIT = {AMD: 512}  # registers; 255 on the others


def everything(target: int) -> Iterator[Loop]:
    yield from loops(target, SPECS)
    yield from expert_loops(target, SPECS)
    yield from other_loops(target, SPECS)


def key_of(loop: Loop) -> str:
    """Changes where the kernel, anything it calls, its constants or the compiler change."""
    case = loop.case
    facts = (loop.name, case.kernel.cache_key, case.spec, case.dtype, case.constants, case.warps,
             case.stages, triton.__version__)  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@cache
def named(target: int) -> dict[str, Loop]:
    return {loop.name: loop for loop in everything(target)}


def facts_of(loop: Loop, target: int) -> Facts:
    begun = time.monotonic()
    try:
        made = compiled(loop.case, target)
    except Exception as error:  # whatever the compiler says is a result
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {
        "registers": made.registers,
        "spilled": made.spilled,
        "shared": made.shared,
        "matrix": made.matrix,
        "seconds": round(time.monotonic() - begun, 1),
    }


def compile_one(job: tuple[int, str]) -> Facts:
    target, name = job
    loop = named(target)[name]
    return {"key": key_of(loop), "name": name, **facts_of(loop, target)}


def faults(loop: Loop, found: Facts, target: int) -> list[str]:
    """What is wrong with a result, in words."""
    if "error" in found:
        return [found["error"]]
    wrong = []
    if found["spilled"]:
        wrong.append(f"{found['spilled']} bytes of local memory")
    if found["registers"] > LIMIT.get(target, 255):
        wrong.append(f"{found['registers']} registers")
    if found["shared"] > min(loop.bound, device_of(target).shared):
        wrong.append(f"{found['shared']} bytes of shared memory, not {loop.bound} at most")
    if loop.matrix != bool(found["matrix"]):
        wrong.append(f"{found['matrix']} matrix instructions")
    return wrong


def report(results: dict[str, Facts], targets: list[int]) -> tuple[list[str], int]:
    """The table as lines, and how many kernels are faulty."""
    lines = [
        "# Every Triton kernel that can be chosen, compiled ahead of time",
        "",
        f"By `python tests/triton_aot_all.py`, with triton {triton.__version__}; no GPU was used.",
        "Those of `triton_kernels/excluded.json` would spill or not compile, and are not chosen.",
        "",
        "| target | kernels | registers, most | shared memory, most | local memory | excluded |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    wrong = []
    for target in targets:
        known = [loop for loop in named(target).values() if not loop.excluded]
        done = [(loop, results[key]) for loop in known if (key := key_of(loop)) in results]
        for loop, facts in done:
            words = faults(loop, facts, target)
            wrong += [f"- {loop.name}: {', '.join(words)}"] if words else []
        good = [facts for _, facts in done if "error" not in facts]
        most = {what: max((facts[what] for facts in good), default=0)
                for what in ("registers", "shared", "spilled")}  # fmt: skip
        local = f"{most['spilled']} bytes" if most["spilled"] else "none"
        count = str(len(done)) if len(done) == len(known) else f"{len(done)} of {len(known)}"
        lines.append(
            f"| {name_of(target)} | {count} | {most['registers']} | {most['shared']} bytes "
            f"| {local} | {len(named(target)) - len(known)} |"
        )
    lines += ["", "Not as they must be:", "", *wrong] if wrong else []
    return lines, len(wrong)


def badly_compiled(results: dict[str, Facts]) -> dict[str, list[str]]:
    """What `excluded.loops` gives: names of loops without their target. What was not compiled stays
    as it was."""
    found: dict[str, list[str]] = {}
    for target in TARGETS:
        names = found.setdefault(str(device_of(target).arch), [])
        for loop in named(target).values():
            facts = results.get(key_of(loop), {"spilled": loop.excluded})
            if (facts.get("spilled") or "error" in facts) and loop.kind != "other":
                names.append(loop.name.removeprefix(f"{name_of(target)}-"))
    return found


def write_excluded(found: dict[str, list[str]]) -> None:
    """Replaces what is known of this version of triton."""
    known = json.loads(excluded.PATH.read_text(encoding="utf-8"))
    version = ".".join(map(str, excluded.parsed(triton.__version__)))
    known[version] = {arch: sorted(names) for arch, names in found.items()}
    ordered = dict(sorted(known.items(), key=lambda item: excluded.parsed(item[0])))
    excluded.PATH.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    excluded.loops.cache_clear()


def untuned(target: int, loop: Loop) -> bool:
    """Whether it is chosen without a table, for some number of rows: those come first."""
    if loop.kind == "other":
        return True
    element = 4 if loop.kind.endswith("f32") else 2
    return not loop.excluded and any(
        loop.config == configs.default(loop.kind, m, device_of(target), loop.case.spec, element,
                                       loop.split if loop.kind != "gemv" else 1)
        for m in configs.BUCKETS
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", default=",".join(map(name_of, TARGETS)))
    parser.add_argument("--record", type=Path, default=Path("build/triton_aot.jsonl"))
    parser.add_argument("--no-compile", action="store_true", help="only what the record has")
    parser.add_argument("--report", type=Path, help="file for the table")
    parser.add_argument("--exclude", action="store_true", help="write triton_kernels/excluded.json")
    args = parser.parse_args()
    targets = [target for target in TARGETS if name_of(target) in args.targets.split(",")]
    results: dict[str, Facts] = {}
    if args.record.exists():
        for line in args.record.read_text().splitlines():
            facts = json.loads(line)
            results[facts["key"]] = facts
    args.record.parent.mkdir(parents=True, exist_ok=True)
    todo = [
        (target, loop)
        for target in targets
        for loop in named(target).values()
        if key_of(loop) not in results and not args.no_compile
    ]
    todo.sort(key=lambda job: (job[1].experts, not untuned(*job)))
    print(f"{len(todo)} kernels to compile", flush=True)
    with multiprocessing.Pool(args.jobs) as pool, args.record.open("a") as record:
        jobs = [(target, loop.name) for target, loop in todo]
        for facts in pool.imap_unordered(compile_one, jobs):
            results[facts["key"]] = facts
            record.write(json.dumps(facts) + "\n")
            record.flush()
    if args.exclude:
        write_excluded(badly_compiled(results))
        named.cache_clear()
    lines, wrong = report(results, targets)
    if args.report:
        args.report.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
