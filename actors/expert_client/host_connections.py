"""Which hosts own which experts, and the connections to them: made, watched and made again beside the engine.

The engine's thread reads `routes`, a snapshot that is replaced as a whole, and reports channels that are lost or slow;
a thread of its own looks hosts up and connects. What a host owns is told by its welcome, or by a placement where that
is newer. Knows endpoints and ownership; knows no rows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from actors.data_plane.channel import ExpertChannel, HostEndpoint, HostLost, Welcome
from actors.expert_client.host_connection import HostConnection, make_routes
from actors.expert_client.routes import Routes
from cluster.errors import ConfigError, MoesaicError, Unavailable
from cluster.logs import log_event
from cluster.periodic import Pace, PeriodicLoop
from cluster.placement.plan import Placement

_LOG = logging.getLogger(__name__)
_OTHERS_S = 30.0  # from the first connection on, a start waits this long for the others
_CLOSE_TIMEOUT_S = 10.0
_JOIN_S = 3.0  # a placement waits this long for its newcomers; the scheduler gives workers 10 s to follow it

Locate = Callable[[int], HostEndpoint]
Connect = Callable[[HostEndpoint], ExpertChannel]


class HostConnections:
    """Connections of one worker to hosts: those that it starts with, later those of the placement."""

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
        self._links = {index: HostConnection() for index in range(num_hosts)}
        self._placement: Placement | None = None
        self._next: Placement | None = None  # followed when those that it brings are connected, or had their time
        self._joining: set[int] = set()
        self._next_by_s = 0.0
        self._left: list[ExpertChannel] = []  # of hosts that are out of the placement; the engine's thread ends them
        self._num_slow = 0
        self._changed = threading.Condition()
        self._fatal: ConfigError | None = None
        self.routes = self._make_routes()
        self._loop = PeriodicLoop(self.connect_due, Pace("host-links", interval_s=None))

    @property
    def degraded(self) -> tuple[str, ...]:
        """Hosts that are away or too slow, in words."""
        with self._changed:
            away = [
                f"expert host {i} is away ({link.reason}); its experts are read from the checkpoint here"
                for i, link in self._links.items()
                if link.channel is None and i not in self._joining
            ]
            slow = [
                f"expert host {i} is slow; others compute for it"
                for i, link in self._links.items()
                if link.slow_since_s is not None
            ]
        return (*away, *slow)

    @property
    def carriers(self) -> tuple[str, ...]:
        """How each host is reached: the carrier's name, or `away`."""
        with self._changed:
            return tuple("away" if link.channel is None else link.channel.carrier for link in self._links.values())

    @property
    def is_complete(self) -> bool:
        """Whether all hosts are connected and answer."""
        return len(self.routes.channels) == len(self._links)

    @property
    def epoch(self) -> int:
        """Of the placement that is followed; 0: none, hosts' welcomes are."""
        return 0 if self._placement is None else self._placement.epoch

    def start(self, timeout_s: float) -> None:
        """Connect to all hosts, then keep connected. Some of them will do, if the others take much longer.

        Raises:
            ConfigError: a host could not start, and why.
            Unavailable: none answered in time, or not all in less; names the first and its reason.
        """
        self._loop.start()
        end_s = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._fatal is not None or self.routes.channels, timeout_s)
            others_s = min(_OTHERS_S, max(0.0, end_s - time.monotonic()))
            self._changed.wait_for(lambda: self._fatal is not None or self.is_complete, others_s)
            failure: MoesaicError | None = self._fatal
            missing = next((i for i, link in self._links.items() if link.channel is None), None)
            is_over = not self.routes.channels or time.monotonic() >= end_s
            if failure is None and missing is not None and is_over:
                reason = self._links[missing].reason
                failure = Unavailable(f"expert host {missing} after {timeout_s:.0f} s: {reason}")
        if failure is not None:
            self.close()
            raise failure

    def set_placement(self, placement: Placement) -> None:
        """Follow a placement, from the next layer on where its hosts are connected. From any thread.

        Newcomers are connected first, for a few seconds at most: until then the hosts before them are asked. Frames
        under way are not disturbed: hosts take the epoch before until every worker has switched.
        """
        with self._changed:
            if placement.epoch <= (self.epoch if self._next is None else self._next.epoch):
                return
            newcomers = _wanted(placement) - set(self._links)
            self._links = dict(sorted({**self._links, **{index: HostConnection() for index in newcomers}}.items()))
            self._next, self._next_by_s = placement, self._clock() + _JOIN_S
            self._joining = newcomers | (self._joining & _wanted(placement))
            self._follow_if_due()
        self._loop.soon()

    def lose(self, channel: ExpertChannel, reason: str) -> None:
        """Take a channel out of the routes; it is connected anew in the background."""
        index = self._take_out(channel, reason)
        if index is not None:
            self.num_lost += 1
            log_event(_LOG, logging.WARNING, "expert host lost", host=index, reason=reason)
            self._loop.soon()

    def suspect(self, channel: ExpertChannel) -> None:
        """A host took too long: ask others until it has answered all it was asked."""
        with self._changed:
            link = next((link for link in self._links.values() if link.channel is channel), None)
            if link is not None and link.slow_since_s is None:
                link.slow_since_s = self._clock()
                self._count_slow()
                self.routes = self._make_routes()

    def review(self, timeout_s: float) -> None:
        """Take slow hosts back that have answered by now, and give up those that did not within `timeout_s`.

        Of the engine's thread, as all use of channels.
        """
        if self._next is not None:
            with self._changed:
                self._follow_if_due()
        if self._left:
            with self._changed:
                left, self._left = self._left, []
            for channel in left:
                channel.close()
        if not self._num_slow:
            return
        for link in list(self._links.values()):
            channel, since_s = link.channel, link.slow_since_s
            if channel is None or since_s is None:
                continue
            try:
                is_settled = channel.settle()
            except HostLost as error:
                self.lose(channel, error.message)
                continue
            if is_settled:
                with self._changed:
                    link.slow_since_s = None
                    self._count_slow()
                    self.routes = self._make_routes()
            elif self._clock() - since_s > timeout_s:
                self.lose(channel, "no answer in time")

    def refused(self, channel: ExpertChannel, epoch: int, timeout_s: float) -> None:
        """A host is at `epoch` and not at that of the frame: learn what it owns now, or wait for it to catch up."""
        with self._changed:
            link = next((link for link in self._links.values() if link.channel is channel), None)
            if link is None:
                return
            if epoch <= max(self.epoch, channel.welcome.epoch):
                link.behind = epoch
                self.routes = self._make_routes()
                return
        self.renew(channel, timeout_s)

    def renew(self, channel: ExpertChannel, timeout_s: float) -> bool:
        """Connect anew to a host that lives and has a new plan, and wait for it; False if it did not come in time."""
        index = self._take_out(channel, "a new plan", at_once=True)
        if index is None:
            return True  # renewed or lost already
        self._loop.soon()
        with self._changed:
            return self._changed.wait_for(
                lambda: self._loop.is_stopped or index not in self._links or self._links[index].channel is not None,
                timeout_s,
            )

    def connect_due(self) -> float | None:
        """Try the hosts that are away and whose time it is; seconds until the next one's, None if none is away."""
        now = self._clock()
        with self._changed:
            due = [i for i, link in self._links.items() if link.channel is None and link.retry_s <= now]
        for index in due:
            self._try(index)
        now = self._clock()
        with self._changed:
            self._follow_if_due()
            waits = [link.retry_s - now for link in self._links.values() if link.channel is None]
            if self._next is not None:
                waits.append(self._next_by_s - now)
        return max(0.0, min(waits)) if waits else None

    def close(self) -> None:
        """End all connections."""
        self._loop.stop(_CLOSE_TIMEOUT_S)
        with self._changed:
            self._changed.notify_all()
            for channel in (*self._left, *(link.channel for link in self._links.values())):
                if channel is not None:
                    channel.close()

    def _take_out(self, channel: ExpertChannel, reason: str, *, at_once: bool = False) -> int | None:
        """The index of the host whose channel it was. A host that keeps being lost is tried less and less often."""
        channel.close()
        with self._changed:
            index = next((i for i, link in self._links.items() if link.channel is channel), None)
            if index is None:
                return None
            self._links[index].disconnect(reason, self._clock(), at_once=at_once)
            self._count_slow()
            self.routes = self._make_routes()
        return index

    def _try(self, index: int) -> None:
        link = self._links.get(index)
        if link is None:
            return
        try:
            channel = self._connect(self._locate(index))
        except Exception as error:  # noqa: BLE001 - top loop: whatever it is, the host is tried again
            with self._changed:
                link.put_off(str(error) or repr(error), self._clock())
                if isinstance(error, ConfigError):  # it will not start, however long one waits
                    self._fatal = error
                    self._changed.notify_all()
            if not isinstance(error, (OSError, MoesaicError)):
                log_event(_LOG, logging.ERROR, "connecting to an expert host failed", host=index, error=error)
            return
        with self._changed:
            is_wanted = self._links.get(index) is link and not self._loop.is_stopped
            if not is_wanted or not self._fits(channel.welcome):
                channel.close()
                reason = f"it has {channel.welcome.num_experts} experts a layer, or other layers"
                link.put_off(reason, self._clock())
                return
            link.connect(channel, self._clock())
            self._joining.discard(index)
            self.routes = self._make_routes()
            self._changed.notify_all()
        log_event(_LOG, logging.INFO, "expert host connected", host=index, carrier=channel.carrier)

    def _fits(self, welcome: Welcome) -> bool:
        last = max((expert for experts in welcome.owned.values() for expert in experts), default=0)
        has_layers = set(welcome.owned) <= set(self._layers)
        return welcome.num_experts == self._num_experts and last < self._num_experts and has_layers

    def _follow_if_due(self) -> None:
        """Switch to the next placement where nobody is waited for any more. Locked by the caller."""
        if self._next is None or (self._joining and self._clock() < self._next_by_s):
            return
        self._placement, self._next = self._next, None
        self._joining = set()
        for index in set(self._links) - _wanted(self._placement):
            channel = self._links.pop(index).channel
            if channel is not None:
                self._left.append(channel)
        for link in self._links.values():
            link.behind = None
        self._count_slow()
        self.routes = self._make_routes()

    def _count_slow(self) -> None:
        self._num_slow = sum(link.slow_since_s is not None for link in self._links.values())

    def _make_routes(self) -> Routes:
        return make_routes(self._links, self._placement, self._layers, self._num_experts)


def _wanted(placement: Placement) -> set[int]:
    """Hosts that own anything."""
    return {index for index, owned in placement.hosts.items() if any(owned.values())}
