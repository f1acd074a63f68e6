"""Each field of a status is declared once; pages, metrics, the command line and messages of gRPC follow from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from string import Formatter
from typing import Annotated, get_args, get_type_hints

import pytest
from fakes import MEMORY

from cluster.frontend.http.api_routes import _pages
from cluster.status import expert_memory, host, worker
from cluster.status.expert_memory import MEMORY_ROWS, TRAFFIC_ROWS, ExpertMemoryStatus
from cluster.status.fields import Kind, Row, Unit, counter, declared, fact, gauge, info, label, rows, samples
from cluster.status.host import HOST_ROWS, ExpertHostStatus
from cluster.status.scheduler import KnowledgeLine, PlacementLine
from cluster.status.worker import WORKER_ROWS, WorkerStatus

STATUSES = (
    worker.WorkerStatus,
    worker.DataPlaneStatus,
    host.ExpertHostStatus,
    expert_memory.ExpertMemoryStatus,
    expert_memory.TierStatus,
    expert_memory.CalibrationBin,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Shelf:
    room: Annotated[str, label("room", "Where it is.")]
    num_books: Annotated[int, gauge("test_books", "Books on it.")]
    limit: Annotated[int | None, gauge("test_limit", "Books that fit.")] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Library:
    name: Annotated[str, info("test_library", "Its name.", "What it is called.")]
    lent: Annotated[Mapping[str, int], counter("test_lent", "Books lent, by reader.", key="reader", way="desk")]
    open_s: Annotated[float, fact("Since it opened.", Unit.SECONDS)]
    shelves: tuple[_Shelf, ...]

    @property
    def num_lent(self) -> Annotated[int, gauge("test_readers", "Who has any.")]:
        return len(self.lent)


LIBRARY = _Library(name="a", lent={"x": 1, "y": 2}, open_s=2.0, shelves=(_Shelf(room="b", num_books=3),))


def test_samples_follow_from_declarations() -> None:
    found = [(each.metric.name, dict(each.labels), each.value) for each in samples(LIBRARY, process="p")]
    assert found == [
        ("test_lent", {"process": "p", "way": "desk", "reader": "x"}, 1),
        ("test_lent", {"process": "p", "way": "desk", "reader": "y"}, 2),
        ("test_books", {"process": "p", "room": "b"}, 3),
        ("test_readers", {"process": "p"}, 2),
        ("test_library", {"process": "p", "name": "a"}, 1),
    ]
    (told,) = (each.metric.kind for each in samples(LIBRARY) if each.metric.name == "test_library")
    assert told is Kind.INFO


def test_rows_show_numbers_in_their_units() -> None:
    table = (("name / lent", "{name} / {lent}"), ("open", "{open_s}"))
    assert rows(_Library, table, dataclasses.asdict(LIBRARY)) == {"name / lent": "a / 3", "open": "2.0 s"}


@pytest.mark.parametrize("kind", STATUSES)
def test_every_field_is_declared(kind: type) -> None:
    """A number without a meaning and a unit cannot be added."""
    hints = get_type_hints(kind)
    nested = {
        name for name, hint in hints.items() if any(dataclasses.is_dataclass(each) for each in (hint, *get_args(hint)))
    }
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields - nested - set(declared(kind)) == set()
    for name, field in declared(kind).items():
        expected = {"_s": Unit.SECONDS, "_bytes": Unit.BYTES}
        unit = next((unit for end, unit in expected.items() if name.endswith(end)), None)
        assert field.help.endswith((".", "away.")) and (unit is None or field.unit is unit), name


@pytest.mark.parametrize(
    ("kind", "table"),
    [(WorkerStatus, WORKER_ROWS), (ExpertHostStatus, HOST_ROWS), (ExpertMemoryStatus, MEMORY_ROWS + TRAFFIC_ROWS)],
)
def test_rows_name_fields_that_there_are(kind: type, table: tuple[Row, ...]) -> None:
    named = {name for _, text in table for _, name, _, _ in Formatter().parse(text) if name}
    assert named <= {field.name for field in dataclasses.fields(kind)}


def test_a_metric_has_one_meaning_and_one_kind() -> None:
    metrics = [
        field.metric
        for kind in (*STATUSES, KnowledgeLine, PlacementLine)
        for field in declared(kind).values()
        if field.metric is not None
    ]
    assert len({metric.name for metric in metrics}) == len(set(metrics))
    assert {each.metric for each in samples(MEMORY)} <= set(metrics)


def test_the_api_schema_says_what_fields_mean() -> None:
    found = _pages()["ExpertMemoryStatus"]["properties"]["bytes_read"]
    assert found["description"] == "Bytes of experts read from disk. (bytes)"
