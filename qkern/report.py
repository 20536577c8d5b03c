# SPDX-License-Identifier: Apache-2.0
"""What quantize_ did to each module of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleReport:
    """One module. Where it was left alone, `reason` says why and `format` is None."""

    name: str
    kind: str  # class name
    old_bytes: int  # parameters and buffers
    new_bytes: int
    format: str | None = None
    error: float | None = None  # Frobenius norm of the weight's change over that of the weight
    weights: int = 0  # numbers in the quantized weight
    weight_bytes: int = 0  # bytes that they take
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """Every module with parameters or buffers of its own, in the order of the model.

    Bytes count each tensor once, at the first module that has it.
    """

    rows: tuple[ModuleReport, ...]

    def __iter__(self) -> Iterator[ModuleReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> ModuleReport:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"No module of the report is called {name!r}.")

    @property
    def quantized(self) -> tuple[ModuleReport, ...]:
        return tuple(row for row in self.rows if row.format is not None)

    @property
    def left_alone(self) -> tuple[ModuleReport, ...]:
        return tuple(row for row in self.rows if row.format is None)

    @property
    def quantized_count(self) -> int:
        return len(self.quantized)

    @property
    def old_bytes(self) -> int:
        return sum(row.old_bytes for row in self.rows)

    @property
    def new_bytes(self) -> int:
        return sum(row.new_bytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized weights; None where there are none."""
        weights = sum(row.weights for row in self.rows)
        return 8 * sum(row.weight_bytes for row in self.rows) / weights if weights else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "modules": [asdict(row) for row in self.rows],
            "quantized_count": self.quantized_count,
            "old_bytes": self.old_bytes,
            "new_bytes": self.new_bytes,
            "bits_per_weight": self.bits_per_weight,
        }

    def __str__(self) -> str:
        head = ("module", "kind", "old", "new", "format", "error", "")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        lines = ["  ".join(map(_aligned, row, widths, range(len(head)))).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths[:-1]))
        return "\n".join([*lines, self._summary()])

    def _summary(self) -> str:
        bits = self.bits_per_weight
        detail = f" ({bits:.2f} bits per weight)" if bits is not None else ""
        return (
            f"{self.quantized_count} modules quantized{detail}, "
            f"{len(self.left_alone)} left alone: "
            f"{size_text(self.old_bytes)} to {size_text(self.new_bytes)}"
        )


_NUMBERS = (2, 3, 5)  # columns of the table that are aligned to the right


def _cells(row: ModuleReport) -> tuple[str, ...]:
    return (
        row.name or "(root)",
        row.kind,
        size_text(row.old_bytes),
        size_text(row.new_bytes),
        row.format or "-",
        "" if row.error is None else f"{row.error:.4f}",
        row.reason or "",
    )


def _aligned(text: str, width: int, column: int) -> str:
    return text.rjust(width) if column in _NUMBERS else text.ljust(width)


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
