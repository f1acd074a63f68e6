"""Which hosts own which experts, and the connections to them: made, watched and made again beside the engine.

The engine's thread reads `routes`, a snapshot that is replaced as a whole, and reports lost channels; a thread of its
own looks hosts up and connects. Knows endpoints and ownership; knows no rows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.data_plane.channel import ExpertChannel, HostEndpoint, Welcome
from cluster.errors import ConfigError, MoesaicError, Unavailable
from cluster.observability.logs import log_event

_LOG = logging.getLogger(__name__)
_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_STABLE_S = 5.0  # a connection that lasted this long starts the back-off anew

Locate = Callable[[int], HostEndpoint]
Connect = Callable[[HostEndpoint], ExpertChannel]


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Live channels, and by layer for each expert the index of the channel to its owner, or -1.

    `is_whole`: there is one channel, and it leads to all experts.
    """

    channels: tuple[ExpertChannel, ...]
    owner: dict[int, np.ndarray]
    is_whole: bool


@dataclass(slots=True)
class _Link:
    """One host, as this worker sees it."""

    channel: ExpertChannel | None = None
    reason: str = "not connected yet"  # why there is no channel
    failures: int = 0  # in a row: attempts, and connections that did not last
    connected_s: float = 0.0
    retry_s: float = 0.0  # not tried before


class HostLinks:
    """Connections of one worker to `num_hosts` hosts."""

    def __init__(
        self,
        num_hosts: int,
        locate: Locate,
        connect: Connect,
        *,
        layers: Sequence[int],
        num_experts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: locate: where host i is now; may raise while it starts. connect: the handshake, by the best carrier."""
        self.num_lost = 0
        self._locate = locate
        self._connect = connect
        self._layers = tuple(layers)
        self._num_experts = num_experts
        self._clock = clock
        self._links = [_Link() for _ in range(num_hosts)]
        self._wake = threading.Event()
        self._changed = threading.Condition()
        self._stopped = False
        self._fatal: ConfigError | None = None
        self.routes = self._make_routes()
        self._thread = threading.Thread(target=self._run, name="host-links", daemon=True)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Hosts that are away, in words."""
        with self._changed:
            return tuple(
                f"expert host {i} is away ({link.reason}); its experts are read from the checkpoint here"
                for i, link in enumerate(self._links)
                if link.channel is None
            )

    @property
    def carriers(self) -> tuple[str, ...]:
        """How each host is reached: the carrier's name, or `away`."""
        with self._changed:
            return tuple("away" if link.channel is None else link.channel.carrier for link in self._links)

    @property
    def is_complete(self) -> bool:
        """Whether all hosts are connected."""
        return len(self.routes.channels) == len(self._links)

    def start(self, timeout_s: float) -> None:
        """Connect to all hosts, then keep connected.

        Raises:
            ConfigError: a host could not start, and why.
            Unavailable: not all answered in time; names the first and its reason.
        """
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._fatal is not None or self.is_complete, timeout_s)
            failure: MoesaicError | None = self._fatal
            missing = next((i for i, link in enumerate(self._links) if link.channel is None), None)
            if failure is None and missing is not None:
                reason = self._links[missing].reason
                failure = Unavailable(f"expert host {missing} after {timeout_s:.0f} s: {reason}")
        if failure is not None:
            self.close()
            raise failure

    def lose(self, channel: ExpertChannel, reason: str) -> None:
        """Take a channel out of the routes; it is connected anew in the background."""
        index = self._take_out(channel, reason)
        if index is not None:
            self.num_lost += 1
            log_event(_LOG, logging.WARNING, "expert host lost", host=index, reason=reason)
            self._wake.set()

    def renew(self, channel: ExpertChannel, timeout_s: float) -> bool:
        """Connect anew to a host that lives and has a new plan, and wait for it; False if it did not come in time."""
        index = self._take_out(channel, "a new plan", at_once=True)
        if index is None:
            return True  # renewed or lost already
        self._wake.set()
        with self._changed:
            return self._changed.wait_for(lambda: self._links[index].channel is not None or self._stopped, timeout_s)

    def connect_due(self) -> float | None:
        """Try the hosts that are away and whose time it is; seconds until the next one's, None if none is away."""
        now = self._clock()
        with self._changed:
            due = [i for i, link in enumerate(self._links) if link.channel is None and link.retry_s <= now]
        for index in due:
            self._try(index)
        now = self._clock()
        with self._changed:
            waits = [link.retry_s - now for link in self._links if link.channel is None]
        return max(0.0, min(waits)) if waits else None

    def close(self) -> None:
        """End all connections."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        with self._changed:
            self._changed.notify_all()
            for link in self._links:
                if link.channel is not None:
                    link.channel.close()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.clear()
            wait_s = self.connect_due()
            if wait_s is None or wait_s > 0:
                self._wake.wait(wait_s)

    def _take_out(self, channel: ExpertChannel, reason: str, *, at_once: bool = False) -> int | None:
        """The index of the host whose channel it was. A host that keeps being lost is tried less and less often."""
        channel.close()
        with self._changed:
            index = next((i for i, link in enumerate(self._links) if link.channel is channel), None)
            if index is None:
                return None
            link, now = self._links[index], self._clock()
            link.channel, link.reason = None, reason
            if at_once or now - link.connected_s >= _STABLE_S:
                link.failures = 0
            link.retry_s = now if at_once else now + _back_off(link.failures)
            link.failures += 0 if at_once else 1
            self.routes = self._make_routes()
        return index

    def _try(self, index: int) -> None:
        link = self._links[index]
        try:
            channel = self._connect(self._locate(index))
        except Exception as error:  # noqa: BLE001 - top loop: whatever it is, the host is tried again
            with self._changed:
                self._put_off(link, str(error) or repr(error))
                if isinstance(error, ConfigError):  # it will not start, however long one waits
                    self._fatal = error
                    self._changed.notify_all()
            if not isinstance(error, (OSError, MoesaicError)):
                log_event(_LOG, logging.ERROR, "connecting to an expert host failed", host=index, error=error)
            return
        with self._changed:
            if self._stopped or not self._fits(channel.welcome):
                channel.close()
                self._put_off(link, f"it has {channel.welcome.num_experts} experts a layer, or other layers")
                return
            link.channel, link.connected_s = channel, self._clock()
            self.routes = self._make_routes()
            self._changed.notify_all()
        log_event(_LOG, logging.INFO, "expert host connected", host=index, carrier=channel.carrier)

    def _put_off(self, link: _Link, reason: str) -> None:
        link.reason = reason
        link.failures += 1
        link.retry_s = self._clock() + _back_off(link.failures)

    def _fits(self, welcome: Welcome) -> bool:
        last = max((expert for experts in welcome.owned.values() for expert in experts), default=0)
        has_layers = set(welcome.owned) <= set(self._layers)
        return welcome.num_experts == self._num_experts and last < self._num_experts and has_layers

    def _make_routes(self) -> Routes:
        channels = [link.channel for link in self._links if link.channel is not None]
        owner = {layer: np.full(self._num_experts, -1, dtype=np.int16) for layer in self._layers}
        for index, channel in reversed(list(enumerate(channels))):  # the first owner of a replica wins
            for layer, experts in channel.welcome.owned.items():
                owner[layer][list(experts)] = index
        is_whole = len(channels) == 1 and all((experts == 0).all() for experts in owner.values())
        return Routes(tuple(channels), owner, is_whole)


def _back_off(failures: int) -> float:
    """Seconds until the next attempt after so many failures before it."""
    return 0.0 if failures == 0 else _RETRY_S[min(failures, len(_RETRY_S)) - 1]
