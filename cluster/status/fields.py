"""Fields of statuses, each declared once: what it means, its unit, the metric it is.

A field is declared where it stands, `hits: Annotated[int, counter("moesaic_expert_cache_hits", "Experts found ...")]`,
a number that follows from others as a property with such a return type. What shows statuses is derived from that:
/metrics (`samples`), rows of the command line (`rows`), descriptions in the API's schema; JSON pages and messages of
gRPC go by the fields' names. Pure; knows no status.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from string import Formatter
from typing import Any, TypeAlias, cast, get_type_hints


class Unit(StrEnum):
    """What a number counts; NONE: things, which the name says."""

    NONE = ""
    BYTES = "bytes"
    SECONDS = "seconds"
    SHARE = "share"  # 0 to 1


class Kind(StrEnum):
    """As Prometheus has it: what is so now, what happened since start, facts in words."""

    GAUGE = "gauge"
    COUNTER = "counter"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Metric:
    """A family of samples. `name` is without the suffix that its kind adds (_total, _info)."""

    name: str
    kind: Kind
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """What is known of a field beside its name and type.

    labels: that its samples have, always with these values. key: a mapping's keys are the values of this label.
    names: its value is the label of that name on every sample of the object it stands in.
    """

    help: str
    unit: Unit = Unit.NONE
    metric: Metric | None = None
    labels: tuple[tuple[str, str], ...] = ()
    key: str = ""
    names: str = ""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        unit = f" ({self.unit})" if self.unit else ""
        return {**handler(schema), "description": f"{self.help}{unit}"}


def fact(text: str, unit: Unit = Unit.NONE) -> Field:
    """A field that is no metric."""
    return Field(help=text, unit=unit)


def label(name: str, text: str) -> Field:
    """What tells objects of one type apart."""
    return Field(help=text, names=name)


def gauge(name: str, text: str, unit: Unit = Unit.NONE, *, key: str = "") -> Field:
    """What is so now."""
    return Field(help=text, unit=unit, metric=Metric(name, Kind.GAUGE, text), key=key)


def counter(
    name: str, text: str, unit: Unit = Unit.NONE, *, key: str = "", family: str | None = None, **labels: str
) -> Field:
    """What happened since start. Args: family: the metric's help, where fields share it."""
    metric = Metric(name, Kind.COUNTER, text if family is None else family)
    return Field(help=text, unit=unit, metric=metric, key=key, labels=tuple(labels.items()))


def info(name: str, text: str, family: str) -> Field:
    """One of the facts that a metric tells in words, under the field's name. Args: family: the metric's help."""
    return Field(help=text, metric=Metric(name, Kind.INFO, family))


@dataclass(frozen=True, slots=True)
class Sample:
    """One number of a metric."""

    metric: Metric
    labels: Mapping[str, str]
    value: float


@lru_cache(maxsize=64)
def declared(kind: type) -> Mapping[str, Field]:
    """Declarations of a dataclass by name: of its fields, then of its properties."""
    hints = get_type_hints(kind, include_extras=True)
    found = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    properties = {name: each.fget for name, each in vars(kind).items() if isinstance(each, property)}
    found |= {name: get_type_hints(get, include_extras=True).get("return") for name, get in properties.items() if get}
    said = {name: getattr(hint, "__metadata__", ()) for name, hint in found.items()}
    return {name: each for name, all_said in said.items() for each in all_said if isinstance(each, Field)}


def samples(status: object, **labels: str) -> Iterator[Sample]:
    """Every sample of a status and of what stands in it; what is None gives none.

    Args: labels: that all of them have.
    """
    fields = declared(type(status))
    labels |= {field.names: str(getattr(status, name)) for name, field in fields.items() if field.names}
    facts: dict[Metric, dict[str, str]] = {}
    own = [field.name for field in dataclasses.fields(cast("Any", status))]
    for name in dict.fromkeys((*own, *fields)):
        value, field = cast("object", getattr(status, name)), fields.get(name)
        if value is None:
            continue
        if field is None or field.metric is None:
            yield from _inner(value, labels)
        elif field.metric.kind is Kind.INFO:
            facts.setdefault(field.metric, {})[name] = str(value)
        elif isinstance(value, Mapping):
            for key, number in cast("Mapping[object, float]", value).items():
                yield Sample(field.metric, {**labels, **dict(field.labels), field.key: str(key)}, number)
        else:
            yield Sample(field.metric, {**labels, **dict(field.labels)}, cast("float", value))
    for metric, words in facts.items():
        yield Sample(metric, labels | words, 1)


def _inner(value: object, labels: Mapping[str, str]) -> Iterator[Sample]:
    for each in cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,):
        if dataclasses.is_dataclass(each):
            yield from samples(each, **labels)


Row: TypeAlias = tuple[str, str]
"""Name of a row of the command line, and its text, with names of fields in braces."""


def rows(kind: type, table: Sequence[Row], values: Mapping[str, Any]) -> dict[str, str]:
    """The rows of a status, each number in its unit. Args: values: the status as its JSON page gives it."""
    formatter = _Shown(declared(kind), values)
    return {name: formatter.format(text) for name, text in table}


class _Shown(Formatter):
    def __init__(self, fields: Mapping[str, Field], values: Mapping[str, Any]) -> None:
        self._fields = fields
        self._values = values

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        name = str(key)
        field = self._fields.get(name)
        return shown(self._values.get(name), Unit.NONE if field is None else field.unit)


def shown(value: Any, unit: Unit) -> str:
    """A number for people; of a mapping the sum.

    >>> shown(3 * 2**20, Unit.BYTES), shown({"ram": 0.25, "disk": 0.5}, Unit.SECONDS), shown(0.125, Unit.SHARE)
    ('3.0 MiB', '0.8 s', '12.5%')
    """
    if isinstance(value, Mapping):
        value = sum(cast("Mapping[str, float]", value).values())
    if value is None or unit is Unit.NONE:
        return str(value)
    match unit:
        case Unit.BYTES:
            return f"{value / 2**20:.1f} MiB"
        case Unit.SECONDS:
            return f"{value:.1f} s"
        case Unit.SHARE:
            return f"{value:.1%}"
