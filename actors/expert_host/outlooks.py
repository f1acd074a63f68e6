"""What workers expect of a host's experts, brought to its memory: the order of eviction, and what is fetched ahead.

A thread of its own, off the path of frames; what comes while it is behind replaces nothing and is dropped, the next one
says it better. Knows outlooks and one memory; knows no connections.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable

from actors.experts.memory.store import ExpertStore
from cluster.errors import InvalidRequest
from cluster.logs import log_event
from cluster.policies.eviction.score_snapshot import ScoreSnapshot
from cluster.policies.outlook import HALF_LIFE_S, JoinedOutlook, decode_outlook

_LOG = logging.getLogger(__name__)
_MAX_WAITING = 64
_CLOSE_TIMEOUT_S = 5.0


class HostOutlooks:
    """An OutlookSink over the memory that `start` gives it; until then nobody listens.

    num_heard, num_dropped: outlooks that were taken in, and those that came while too many waited or made no sense.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_heard = self.num_dropped = 0
        self._clock = clock
        self._news: queue.Queue[tuple[Hashable, bytes | None] | None] = queue.Queue(_MAX_WAITING)
        self._joined: JoinedOutlook | None = None
        self._store: ExpertStore | None = None
        self._scores: ScoreSnapshot | None = None
        self._thread = threading.Thread(target=self._run, name="host-outlooks", daemon=True)

    @property
    def num_speakers(self) -> int:
        """Workers whose word counts now."""
        return 0 if self._joined is None else self._joined.num_speakers

    def start(self, store: ExpertStore, scores: ScoreSnapshot | None) -> None:
        """Begin to listen. Args: scores: the eviction's; None: it needs nobody's."""
        self._joined, self._store, self._scores = JoinedOutlook(store.grid.size), store, scores
        self._thread.start()

    def hear(self, worker: Hashable, data: bytes) -> None:
        self._put((worker, data))

    def forget(self, worker: Hashable) -> None:
        self._put((worker, None))  # if it is lost: what a worker said is forgotten in seconds anyway

    def close(self) -> None:
        """Listen no more; before the memory is closed."""
        if self._store is None:
            return
        self._store = None
        self._put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _put(self, item: tuple[Hashable, bytes | None] | None) -> None:
        if self._joined is None:
            return
        try:
            self._news.put_nowait(item)
        except queue.Full:
            self.num_dropped += 1

    def _run(self) -> None:
        joined = self._joined
        assert joined is not None
        while (news := self._next(joined)) is not None:
            for worker, data in news:
                self._take(joined, worker, data)
            store = self._store
            if store is None:
                return
            values, ahead = joined.at(self._clock())
            if self._scores is not None:
                self._scores.publish(values)
            store.protected.expect(ahead)

    def _next(self, joined: JoinedOutlook) -> list[tuple[Hashable, bytes | None]] | None:
        """All that came; nothing after a while, for what was said to fade. None: the host stops."""
        items: list[tuple[Hashable, bytes | None] | None] = []
        try:
            items.append(self._news.get(timeout=HALF_LIFE_S if joined.num_speakers else None))
            while True:
                items.append(self._news.get_nowait())
        except queue.Empty:
            pass
        news = [item for item in items if item is not None]
        return news if len(news) == len(items) else None

    def _take(self, joined: JoinedOutlook, worker: Hashable, data: bytes | None) -> None:
        if data is None:
            joined.forget(worker)
            return
        try:
            joined.hear(worker, decode_outlook(data, joined.size), self._clock())
            self.num_heard += 1
        except InvalidRequest as error:
            self.num_dropped += 1
            if self.num_dropped == 1:
                log_event(_LOG, logging.WARNING, "an outlook was left out", reason=error.message)
