"""One expert host, as a worker sees it: its connection, when to try it next, what it owns and at which epoch it is.

Knows no threads: HostConnections guards it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.data_plane.channel import ExpertChannel, Welcome
from actors.expert_client.routes import Routes
from cluster.execution.host_times import HostTimes
from cluster.placement.plan import Placement

_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_STABLE_S = 5.0  # a connection that lasted this long starts the back-off anew


@dataclass(slots=True)
class HostConnection:
    """slow_since_s: it owes answers that nobody waits for any more. behind: the epoch it is still at, if it said so."""

    channel: ExpertChannel | None = None
    reason: str = "not connected yet"  # why there is no channel
    failures: int = 0  # in a row: attempts, and connections that did not last
    connected_s: float = 0.0
    retry_s: float = 0.0  # not tried before
    slow_since_s: float | None = None
    behind: int | None = None
    times: HostTimes = field(default_factory=HostTimes)

    def connect(self, channel: ExpertChannel, now_s: float) -> None:
        """There is a connection."""
        self.channel, self.connected_s = channel, now_s
        self.behind, self.times = None, HostTimes()

    def put_off(self, reason: str, now_s: float) -> None:
        """An attempt failed."""
        self.reason = reason
        self.failures += 1
        self.retry_s = now_s + _back_off(self.failures)

    def disconnect(self, reason: str, now_s: float, *, at_once: bool) -> None:
        """The connection ended; one that keeps being lost is tried less and less often. Args: at_once: try it now."""
        self.channel, self.reason, self.slow_since_s = None, reason, None
        if at_once or now_s - self.connected_s >= _STABLE_S:
            self.failures = 0
        self.retry_s = now_s if at_once else now_s + _back_off(self.failures)
        self.failures += 0 if at_once else 1


def make_routes(
    links: Mapping[int, HostConnection], placement: Placement | None, layers: Sequence[int], num_experts: int
) -> Routes:
    """Routes over the hosts that answer; the newer of placement and welcome says what each owns."""
    hosts = [
        (
            link.channel,
            _epoch(link, link.channel.welcome, placement),
            link.times,
            _owned(index, link.channel, placement),
        )
        for index, link in links.items()
        if link.channel is not None and link.slow_since_s is None
    ]
    return Routes.of(hosts, layers, num_experts)


def _epoch(link: HostConnection, welcome: Welcome, placement: Placement | None) -> int:
    if link.behind is not None:
        return link.behind
    return welcome.epoch if placement is None else max(welcome.epoch, placement.epoch)


def _owned(index: int, channel: ExpertChannel, placement: Placement | None) -> Mapping[int, tuple[int, ...]]:
    if placement is None or channel.welcome.epoch > placement.epoch:
        return channel.welcome.owned
    return placement.hosts.get(index, {})


def _back_off(failures: int) -> float:
    """Seconds until the next attempt after so many failures before it."""
    return 0.0 if failures == 0 else _RETRY_S[min(failures, len(_RETRY_S)) - 1]
