"""What a benchmark found: rows, targets and the circumstances."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.shared.circumstances import machine
from benchmarks.shared.markdown import report_text

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A number the project promised; `met` is computed from `value`, never typed."""

    name: str
    target: str
    value: float
    met: bool


@dataclass(frozen=True, slots=True)
class Table:
    """Rows for people, under a title."""

    title: str
    rows: list[Row]


@dataclass(slots=True)
class Report:
    """Rows of a table, targets, and the circumstances.

    rows: every number, for machines. tables: what people are shown of them; without any, the rows themselves.
    """

    title: str
    rows: list[Row] = field(default_factory=list[Row])
    targets: list[Target] = field(default_factory=list[Target])
    notes: list[str] = field(default_factory=list[str])
    tables: list[Table] = field(default_factory=list[Table])
    load_before: tuple[float, float, float] = field(default_factory=os.getloadavg)

    def at_least(self, name: str, value: float, bound: float) -> None:
        """Record a target of the form value >= bound."""
        self.targets.append(Target(name, f">= {bound:g}", value, value >= bound))

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Record a target of the form value <= bound."""
        self.targets.append(Target(name, f"<= {bound:g}", value, value <= bound))

    @property
    def shown(self) -> list[Table]:
        """The tables for people."""
        return self.tables or ([Table(self.title, self.rows)] if self.rows else [])

    @property
    def all_met(self) -> bool:
        return all(target.met for target in self.targets)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON has it: a number that is not finite is null."""
        return _as_json(
            {
                "title": self.title,
                "rows": self.rows,
                "targets": [asdict(target) for target in self.targets],
                "notes": self.notes,
                "machine": machine(),
                "load_average": {"before": self.load_before, "after": os.getloadavg()},
            }
        )

    def finish(self, *, as_json: bool) -> int:
        """Print; the exit code is 0 if every target was met, else 1."""
        text = json_text(self.to_json()) if as_json else report_text(self)
        sys.stdout.write(text)
        sys.stdout.flush()
        return 0 if self.all_met else 1


def json_text(document: dict[str, Any]) -> str:
    """One document, and a line's end."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _as_json(value: Any) -> Any:
    """Plain values: NumPy's own as Python's, and null for what is NaN or infinite."""
    if hasattr(value, "tolist"):  # a number or an array of NumPy
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value
