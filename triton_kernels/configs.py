# SPDX-License-Identifier: Apache-2.0
"""Which configuration a call runs with: pure functions of numbers, no device, no clock.

A configuration is a tile shape with its warps and pipeline stages. Any configuration is right for
any shape and format; they differ in speed alone. `choose_linear` and its siblings look in a table
of measured choices (`configs.json` here, then the user's own file that `qkern tune` writes) and
fall back to a rule that needs no tuning.

A row has the same bits whatever rows come with it: how K is cut into parts depends on the weight
and the device alone, and within a part the matrix instructions of any tile add step by step along
K. Up to 64 rows parts run side by side ("split"), beyond, each tile sums its own ("tile"). Who
gives that up (`batch_invariant=False`) gets what is faster: a few rows without the matrix units
("gemv"), and no parts where tiles are many.
"""

from __future__ import annotations

import json
import os
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import excluded
from .spec import INT8_CHUNK, Spec

TABLE_VERSION = 1
SPLITS = (1, 2, 4, 8, 16)
BUCKETS = (16, 32, 64, 128, 256)  # rows of x; the last is "more than 128"


@dataclass(frozen=True, order=True)
class Config:
    """Tile: ``rows`` of x, ``cols`` rows of the weight (outputs), ``depth`` columns of K."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return "x".join(map(str, astuple(self)))


@dataclass(frozen=True)
class Device:
    """What a choice may depend on. ``arch``: compute capability times 10, or 0 where not NVIDIA."""

    name: str
    arch: int
    units: int  # multiprocessors
    shared: int  # bytes of shared memory a block may use


@dataclass(frozen=True)
class Choice:
    """``family``: "gemv", "split" or "tile"; ``split``: parts of K."""

    family: str
    config: Config
    split: int = 1


GENERIC = Device("generic", 0, 64, 65536)

# Everything that can be chosen, per kind of loop. gemv: rows is how many rows a program takes.
CANDIDATES: dict[str, tuple[Config, ...]] = {
    "gemv": (
        Config(1, 8, 256, 4, 3),
        Config(1, 8, 512, 4, 1),
        Config(1, 8, 512, 4, 3),
        Config(1, 16, 256, 4, 3),
        Config(1, 4, 1024, 4, 3),
    ),
    # 64 rows of the weight or more: one kind of matrix instruction for all, wgmma on Hopper.
    "dot": (
        Config(16, 64, 128, 4, 3),
        Config(16, 64, 128, 4, 4),
        Config(16, 64, 64, 4, 4),
        Config(16, 128, 128, 8, 4),
        Config(32, 64, 128, 4, 3),
        Config(32, 64, 64, 4, 3),
        Config(64, 64, 64, 4, 3),
        Config(64, 128, 64, 8, 3),
        Config(128, 64, 64, 4, 3),
        Config(128, 64, 64, 8, 3),
        Config(128, 128, 64, 8, 2),
        Config(128, 128, 64, 8, 3),
        Config(256, 128, 64, 8, 3),
    ),
    # Less than 64 rows of the first operand: from there on triton 3.6 multiplies float32 in tf32 on
    # sm_100, whatever precision is asked for (tcgen05.mma.kind::tf32; 3.9 does not).
    "dot_f32": (
        Config(16, 32, 32, 4, 2),
        Config(32, 32, 32, 4, 2),
        Config(64, 32, 32, 8, 2),
    ),
    "int8": (
        Config(16, 64, 128, 4, 4),
        Config(16, 32, 128, 4, 2),
        Config(32, 64, 64, 8, 3),
        Config(32, 64, 128, 4, 3),
        Config(64, 64, 128, 4, 3),
        Config(64, 128, 128, 8, 2),
        Config(128, 64, 128, 8, 3),
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 128, 8, 2),
    ),
    # 64 rows of dy or more, for the same reason; the sum runs over steps of `cols`, one number.
    "grad": (
        Config(64, 64, 64, 4, 2),
        Config(64, 64, 64, 8, 2),
        Config(64, 64, 128, 4, 3),
        Config(128, 64, 64, 8, 3),
        Config(128, 64, 128, 8, 2),
    ),
    "grad_f32": (Config(16, 32, 32, 4, 2), Config(32, 32, 32, 4, 2)),
}
GEMV_LIMIT = {"dot": 4, "dot_f32": 8, "int8": 2}  # largest M of the gemv family
SPLIT_LIMIT = 64  # largest M of the split family
STEP = 128  # columns: the parts of K are multiples of it, and it is one of every depth but gemv's


def bucket(m: int) -> int:
    """The class of m rows: the smallest bucket that holds them."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def shared_bytes(
    kind: str, config: Config, spec: Spec, element: int, device: Device = GENERIC
) -> int:
    """Shared memory of a loop, from above: activations and codes of every stage, and what passes
    through at the end or on the way: the output tile, the addresses of look-ups, the decoded
    operand of a gradient, of products without matrix units, and of codes that straddle bytes. Of
    look-ups for integer products AMD stages the results, for all stages but one."""
    rows = 4 if kind == "gemv" else config.rows
    width = config.cols if kind.startswith("grad") else config.depth
    if kind == "int8":
        element = element + 1 if config.rows <= 16 else 1  # few rows may be quantized on the way
    if kind == "gemv" and spec.activations != "float":
        element = 5 if spec.activations == "int8_group" else 1  # with a scale for each column
    stage = rows * width * element + config.cols * -(-config.depth * spec.bits // 8)
    through = kind.startswith("grad") or kind.endswith("f32") or 8 % spec.bits != 0
    decoded = config.cols * config.depth * element if through else 0
    staged = device.arch == 0 and kind == "int8" and spec.kind == "table"
    stages = config.stages - staged
    entry = (4 if spec.table_type == "float" else 1) * stages if staged else 0
    looked_up = config.cols * config.depth * (8 + entry) if spec.kind == "table" else 0
    return max(stage * stages + decoded + looked_up, config.rows * config.cols * 4)


def for_experts(config: Config) -> Config:
    """The same tile with three stages at most: beside the experts' offsets a fourth one makes ptxas
    spill on sm_80 (16 x 64 x 128, int4: 96 registers and 8 bytes; 108 registers with three)."""
    return replace(config, stages=min(config.stages, 3))


def loop_name(kind: str, config: Config, spec: Spec, split: int, experts: bool = False) -> str:
    """What a compiled loop is called: "many" sums several parts of K, or (gemv) takes 4 rows."""
    words = f"{kind}-{spec.name}-{for_experts(config) if experts else config}"
    return "experts-" * experts + words + "-many" * (split > 1)


def compiled_like(device: Device) -> str:
    """The key of `excluded.loops` for a device: its architecture, or the nearest older one of those
    that were compiled for (86 is like 80); that of AMD is 0."""
    older = [arch for arch in map(int, excluded.loops()) if bool(arch) == bool(device.arch)]
    return str(max((arch for arch in older if arch <= device.arch), default=""))


def is_excluded(
    kind: str, config: Config, spec: Spec, device: Device, split: int = 1, experts: bool = False
) -> bool:
    """Whether the compiler is known to make the loop badly, or not at all."""
    known = excluded.loops().get(compiled_like(device), frozenset())
    splits = (1, 4) if kind == "gemv" else (split,)
    return any(loop_name(kind, config, spec, s, experts) in known for s in splits)


def fits(
    kind: str,
    config: Config,
    spec: Spec,
    element: int,
    device: Device,
    split: int = 1,
    experts: bool = False,
) -> bool:
    """Whether a configuration may be chosen: the hardware has room, and the compiler manages."""
    return has_room(kind, config, spec, element, device, split) and not is_excluded(
        kind, config, spec, device, split, experts
    )


def has_room(
    kind: str, config: Config, spec: Spec, element: int, device: Device, split: int = 1
) -> bool:
    """Whether the hardware has room: shared memory, and registers for the sums of a tile. There
    are float32 sums, integer ones beside them where a chunk of int8 is short, and those of whole
    parts where a program has several. Where operands of the matrix units are registers on both
    sides, or look-ups need some, fewer are left."""
    short = kind == "int8" and spec.chunk() < INT8_CHUNK
    sums = 1 + short + (split > 1)
    roomy = device.arch // 10 in (9, 10) and spec.kind == "int" and not short
    limit = 128 if roomy else 96 if sums > 1 else 64
    if kind != "gemv" and config.rows * config.cols * sums > limit * 32 * config.warps:
        return False
    return shared_bytes(kind, config, spec, element, device) <= device.shared


def split_count(n: int, k: int, cols: int, depth: int, programs: int) -> int:
    """Parts of K so that about `programs` programs run, each with at least four steps."""
    tiles = -(-n // cols)
    split = 1
    for candidate in SPLITS[1:]:
        if tiles * split >= programs or k < candidate * depth * 4:
            break
        split = candidate
    return split


def span_of(k: int, split: int, depth: int) -> int:
    """Columns of a part: whole steps of `depth`."""
    steps = -(-k // (split * depth))
    return steps * depth


# What runs where nothing was measured: per bucket, the first that fits the device.
DEFAULTS: dict[str, dict[int, tuple[Config, ...]]] = {
    "gemv": dict.fromkeys(BUCKETS, (Config(1, 8, 512, 4, 3), Config(1, 8, 256, 4, 3))),
    "dot": {
        16: (Config(16, 64, 128, 4, 4), Config(16, 64, 64, 4, 4)),
        32: (Config(32, 64, 128, 4, 3), Config(32, 64, 64, 4, 3)),
        64: (Config(64, 64, 64, 4, 3), Config(16, 64, 64, 4, 4)),
        128: (
            Config(128, 64, 64, 4, 3),
            Config(128, 64, 64, 8, 3),
            Config(64, 64, 64, 4, 3),
            Config(16, 64, 64, 4, 4),
        ),
        256: (
            Config(256, 128, 64, 8, 3),
            Config(128, 128, 64, 8, 3),
            Config(128, 128, 64, 8, 2),
            Config(128, 64, 64, 8, 3),
            Config(64, 64, 64, 4, 3),
            Config(16, 64, 64, 4, 4),
        ),
    },
    "dot_f32": {
        **dict.fromkeys((16, 32), (Config(16, 32, 32, 4, 2),)),
        **dict.fromkeys((64, 128, 256), (Config(64, 32, 32, 8, 2),)),
    },
    "int8": {
        16: (Config(16, 64, 128, 4, 4), Config(16, 32, 128, 4, 2)),
        32: (Config(32, 64, 128, 4, 3), Config(16, 32, 128, 4, 2)),
        64: (Config(64, 64, 128, 4, 3), Config(16, 32, 128, 4, 2)),
        128: (Config(128, 64, 128, 8, 3), Config(64, 64, 128, 4, 3), Config(16, 32, 128, 4, 2)),
        256: (
            Config(128, 128, 64, 8, 3),
            Config(128, 64, 128, 8, 3),
            Config(64, 64, 128, 4, 3),
            Config(16, 32, 128, 4, 2),
        ),
    },
    "grad": {
        **dict.fromkeys((16, 32, 64), (Config(64, 64, 128, 4, 3), Config(64, 64, 64, 4, 2))),
        **dict.fromkeys(
            (128, 256),
            (Config(128, 64, 128, 8, 2), Config(128, 64, 64, 8, 3), Config(64, 64, 64, 4, 2)),
        ),
    },
    "grad_f32": {
        **dict.fromkeys((16, 32), (Config(16, 32, 32, 4, 2),)),
        **dict.fromkeys((64, 128, 256), (Config(32, 32, 32, 4, 2),)),
    },
}


@lru_cache(maxsize=4096)
def default(
    kind: str,
    rows: int,
    device: Device,
    spec: Spec,
    element: int,
    split: int = 1,
    experts: bool = False,
) -> Config:
    """The configuration for a number of rows that needs no tuning."""
    preferred = [
        config
        for config in DEFAULTS[kind][bucket(rows)]
        if has_room(kind, config, spec, element, device, split)
    ]
    candidates = sorted(CANDIDATES[kind], key=lambda c: shared_bytes(kind, c, spec, element))
    fitting = [c for c in candidates if fits(kind, c, spec, element, device, split, experts)]
    chosen = (fitting or candidates)[0]
    if preferred and fitting:
        # Where the first choice is excluded, what is most like it.
        wanted = preferred[0]
        chosen = min(fitting, key=lambda c: (abs(c.rows - wanted.rows), abs(c.cols - wanted.cols),
                                             abs(c.depth - wanted.depth), c != wanted))  # fmt: skip
    return for_experts(chosen) if experts else chosen


class Table:
    """Measured choices: ``{device: {"kind|format|NxK": {"m16": [...], "split": 4, ...}}}``."""

    def __init__(self, devices: dict[str, dict[str, dict[str, Any]]] | None = None) -> None:
        self.devices = devices or {}

    @staticmethod
    def key(kind: str, spec: Spec, n: int, k: int) -> str:
        return f"{kind}|{spec.name}|{n}x{k}"

    @classmethod
    def read(cls, path: Path) -> Table:
        """The table in a file; an unreadable or foreign one is a ValueError that names it."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["version"] != TABLE_VERSION:
                raise ValueError(f"version {data['version']}, not {TABLE_VERSION}")
            table = cls(data["devices"])
            for entries in table.devices.values():
                for key, entry in entries.items():
                    table._check(key.split("|")[0], entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a table of Triton configurations: {error}") from error
        return table

    @staticmethod
    def _check(kind: str, entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name in ("split", "gemv_split"):
                if value not in SPLITS:
                    raise ValueError(f"a split of {value!r}")
            elif name == "gemv" or name[1:].isdigit():
                if Config(*value) not in CANDIDATES["gemv" if name == "gemv" else kind]:
                    raise ValueError(f"{value!r} is not a configuration of {kind}")
            else:
                raise ValueError(f"an entry named {name!r}")

    def write(self, path: Path) -> None:
        """Replace the file at once, so that an interruption leaves the old or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        data = {"version": TABLE_VERSION, "devices": self.devices}
        part.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, path)

    def find(self, device: Device, kind: str, spec: Spec, n: int, k: int) -> dict[str, Any]:
        return self.devices.get(device.name, {}).get(self.key(kind, spec, n, k), {})

    def put(self, device: Device, key: str, name: str, value: Config | int) -> None:
        entry = self.devices.setdefault(device.name, {}).setdefault(key, {})
        entry[name] = list(astuple(value)) if isinstance(value, Config) else value

    def merged(self, other: Table) -> Table:
        """This table with the entries of another on top."""
        devices = {name: dict(entries) for name, entries in self.devices.items()}
        for name, entries in other.devices.items():
            for key, entry in entries.items():
                mine = devices.setdefault(name, {})
                mine[key] = {**mine.get(key, {}), **entry}
        return Table(devices)


def user_table_path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "qkern" / "triton_configs.json"


@lru_cache(maxsize=1)
def table() -> Table:
    """The shipped table with the user's on top, read once per process."""
    shipped = Table.read(Path(__file__).with_name("configs.json"))
    path = user_table_path()
    return shipped.merged(Table.read(path)) if path.is_file() else shipped


def loop_kind(spec: Spec, element: int) -> str:
    if spec.activations != "float":
        return "int8"
    return "dot_f32" if element == 4 else "dot"


def parts_of(device: Device, n: int, k: int, entry: dict[str, Any]) -> int:
    """Parts of K of a weight ``[n, k]`` with this entry of the table, for any number of rows."""
    return entry.get("split", split_count(n, k, 64, 128, 2 * device.units))


def choose_linear(
    device: Device,
    spec: Spec,
    element: int,
    m: int,
    n: int,
    k: int,
    batch_invariant: bool = True,
    tuned: Table | None = None,
) -> Choice:
    """For x ``[m, k]`` of `element` bytes a number and a weight ``[n, k]``."""
    kind = loop_kind(spec, element)
    entry = (tuned or table()).find(device, kind, spec, n, k)
    if not batch_invariant and m <= GEMV_LIMIT[kind]:
        config = Config(*entry.get("gemv", astuple(default("gemv", m, device, spec, element))))
        split = entry.get(
            "gemv_split", split_count(n, k, config.cols, config.depth, 2 * device.units)
        )
        return Choice("gemv", config, split)
    split = parts_of(device, n, k, entry)
    found = entry.get(f"m{bucket(m)}")
    if m > SPLIT_LIMIT and not batch_invariant and split > 1:
        # What was measured is a tile with room for the sum of parts.
        found, split = None, 1
    family = "split" if m <= SPLIT_LIMIT else "tile"
    summed = split if family == "tile" else 1  # parts that one program sums
    config = Config(*found) if found else default(kind, m, device, spec, element, summed)
    return Choice(family, config, split)


def expert_share(tokens: int, experts: int) -> int:
    """Tokens of an expert, if they were spread evenly; 128 stand for more."""
    return min(-(-tokens // max(experts, 1)), 128)


def choose_grouped(
    device: Device,
    spec: Spec,
    element: int,
    tokens: int,
    experts: int,
    n: int,
    k: int,
    tuned: Table | None = None,
) -> Choice:
    """Tiles as high as an expert's share of the tokens; the same sums as `choose_linear` for the
    weight ``[n, k]`` of one expert."""
    kind = loop_kind(spec, element)
    entry = (tuned or table()).find(device, kind, spec, n, k)
    split = parts_of(device, n, k, entry)
    share = expert_share(tokens, experts)
    return Choice("tile", default(kind, share, device, spec, element, split, True), split)


def choose_grad(
    device: Device, spec: Spec, element: int, m: int, n: int, k: int, tuned: Table | None = None
) -> Config:
    kind = "grad_f32" if element == 4 else "grad"
    found = (tuned or table()).find(device, kind, spec, n, k).get(f"m{bucket(m)}")
    return Config(*found) if found else default(kind, m, device, spec, element)


def choose_grouped_grad(
    device: Device, spec: Spec, element: int, tokens: int, experts: int
) -> Config:
    """Of `choose_grad` what needs no table: the sum runs over the same steps in every tile."""
    kind = "grad_f32" if element == 4 else "grad"
    share = expert_share(tokens, experts)
    return default(kind, share, device, spec, element, experts=True)


def scale_mode(group: int | None, has_scales: bool, depth: int) -> int:
    """How the scales of a tile of `depth` columns lie: SCALES of `decode`."""
    if not has_scales:
        return 0
    if group is None:
        return 1
    if group % depth == 0:
        return 2
    return 3 if depth % group == 0 else 4
