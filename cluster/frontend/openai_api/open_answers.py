"""Which sequences belong to which answer, so that a client can stop an answer by a name it knows. Only bookkeeping."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

from cluster.types import RequestId


class OpenAnswers:
    """Sequences of the answers being given, by answer id and by the request id that the client sent or was told."""

    def __init__(self) -> None:
        self._sequences_by_name: dict[str, set[RequestId]] = {}

    @contextmanager
    def listed(self, names: Iterable[str], sequence_ids: Sequence[RequestId]) -> Generator[None]:
        """List an answer's sequences under its `names` while it is given. Clients may use a request id twice."""
        names = tuple(names)
        for name in names:
            self._sequences_by_name.setdefault(name, set()).update(sequence_ids)
        try:
            yield
        finally:
            for name in names:
                left = self._sequences_by_name[name].difference(sequence_ids)
                if left:
                    self._sequences_by_name[name] = left
                else:
                    del self._sequences_by_name[name]

    def sequences_of(self, name: str) -> frozenset[RequestId]:
        """Running sequences of the answers of that name; empty if there is none."""
        return frozenset(self._sequences_by_name.get(name, ()))
