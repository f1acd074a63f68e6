"""The experts of all hosts, as a worker's policies see them: one memory that hears what they expect.

Says to each host what concerns the experts that it is asked for, at once and without waiting, in at most a few percent
of the bytes of the frames. Learns from answers what loads cost there. Knows hosts and policies; knows no rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from actors.data_plane.channel import ExpertChannel
from actors.data_plane.frames import CombineFrame
from actors.expert_client.host_connections import HostConnections
from actors.expert_client.routes import Routes
from actors.experts.memory.counters import MemoryCounters
from cluster.execution.replica_choice import choose_fewest_experts
from cluster.policies.base import PolicySet
from cluster.policies.eviction.score_snapshot import sound_scores
from cluster.policies.outlook import ByteShare, encode_outlook
from cluster.policies.signals import Grid

OUTLOOK_SHARE = 0.03
_RATE = 0.1  # of the newest answer in what a load takes
_SPARE_BYTES = 64  # that values leave for a few wishes
_SHARES_S = 1.0  # for which replicas are taken to be chosen alike


@dataclass(frozen=True, slots=True, eq=False)
class _Shares:
    """Which experts each channel is asked for now: [N] bool. room: the hosts have slots for all that they own."""

    routes: Routes
    made_s: float
    of_channel: tuple[tuple[ExpertChannel, np.ndarray], ...]
    num_slots: int
    room: bool


class HostMemory:
    """A policy runner's memory and its publisher. The engine's thread reports answers, the policies' thread speaks.

    num_said, num_left_out: outlooks that were sent, and those for which there was no room in their share of the bytes.
    """

    def __init__(self, grid: Grid, links: HostConnections) -> None:
        self.grid = grid
        self.counters = MemoryCounters(grid.num_layers)
        self.bytes = ByteShare(OUTLOOK_SHARE)
        self.num_said = self.num_left_out = 0
        self._links = links
        self._policies: PolicySet | None = None
        self._values: np.ndarray | None = None
        self._load_s: dict[str, float] = {}  # by host
        self._load_cpu_s = 0.0
        self._known: _Shares | None = None
        self._wishing: set[str] = set()  # hosts that were last told to fetch something

    @property
    def num_slots(self) -> int:
        """Experts that all hosts together have room for."""
        return self._shares().num_slots

    @property
    def holds_everything(self) -> bool:
        """Whether every host has room for all that it owns: then there is nothing to choose."""
        return self._shares().room

    @property
    def loads_give_way(self) -> bool:
        """Whether a prefetch lets a demand go first, on every host."""
        return all(channel.welcome.gives_way for channel in self._links.routes.channels)

    def load_s(self) -> float:
        """Average time that an expert takes into a host's memory; 0: none was loaded yet."""
        known = [seconds for seconds in list(self._load_s.values()) if seconds]
        return sum(known) / len(known) if known else 0.0

    def load_cpu_s(self) -> float:
        """Average processor time that takes of a host, whose experts compute meanwhile."""
        return self._load_cpu_s

    def demand_s(self) -> float:
        """Seconds since start in which demands had the way into a host's memory: steps waited for them."""
        return self.counters.total_stall_s

    def set_policies(self, policies: PolicySet) -> None:
        """Whose values and forecasts are said."""
        self._policies = policies

    def note_frame(self, num_bytes: int) -> None:
        """A frame or its answer went to or came from a host."""
        self.bytes.note_frames(num_bytes)

    def note_answer(self, host_id: str, answer: CombineFrame) -> None:
        """A host computed: what it says of its loads."""
        if answer.load_us:
            before_s = self._load_s.get(host_id, answer.load_us / 1e6)
            self._load_s[host_id] = before_s + _RATE * (answer.load_us / 1e6 - before_s)
            self._load_cpu_s += _RATE * (answer.load_cpu_us / 1e6 - self._load_cpu_s)

    def note_stall(self, stall_s: float) -> None:
        """A layer is over. Args: stall_s: that the host which waited longest for experts did."""
        self.counters.total_stall_s += stall_s

    def publish(self, scores: np.ndarray | None = None) -> None:
        """Say what experts are worth. Args: scores: [N] instead of the policy's own."""
        policies = self._policies
        assert policies is not None
        self._values = sound_scores(policies.scorer.scores() if scores is None else scores)
        if policies.predictor is None:
            self._say(None)

    def want(self, priority: np.ndarray | None, below: np.ndarray | None = None) -> None:
        """Say what is to be fetched ahead; see ExpertStore. Hosts choose for their lower tiers by themselves."""
        self._say(np.zeros(self.grid.size, np.float32) if priority is None else priority)

    def _say(self, ahead: np.ndarray | None) -> None:
        for channel, of_host in self._shares().of_channel:
            host_id = channel.welcome.host_id
            wishes = ahead is not None and bool((ahead[of_host] > 0).any())
            is_news = wishes or host_id in self._wishing  # that nothing is to be fetched needs to be said once
            # Values are many bytes and keep for longer: they leave room for wishes.
            said = self._say_to(channel, of_host, self._values, ahead, spare=_SPARE_BYTES)
            if not said and is_news:
                said = self._say_to(channel, of_host, None, ahead)
            if said:
                (self._wishing.add if wishes else self._wishing.discard)(host_id)
            elif is_news or ahead is None:
                self.num_left_out += 1

    def _say_to(
        self,
        channel: ExpertChannel,
        of_host: np.ndarray,
        values: np.ndarray | None,
        ahead: np.ndarray | None,
        *,
        spare: int = 0,
    ) -> bool:
        """False: there is no room for it."""
        data = encode_outlook(of_host, values, ahead)
        if not self.bytes.take(len(data), spare=spare):
            return False
        channel.send_outlook(data)
        self.num_said += 1
        return True

    def _shares(self) -> _Shares:
        routes, known, now_s = self._links.routes, self._known, time.monotonic()
        is_same = known is not None and known.routes is routes
        if known is not None and is_same and (not routes.has_replicas or now_s - known.made_s < _SHARES_S):
            return known
        owners = np.concatenate([self._owners(routes, layer) for layer in self.grid.layers])
        owned = np.bincount(owners[owners >= 0], minlength=len(routes.channels))
        slots = [channel.welcome.num_slots for channel in routes.channels]
        self._known = shares = _Shares(
            routes=routes,
            made_s=now_s,
            of_channel=tuple((channel, owners == i) for i, channel in enumerate(routes.channels)),
            num_slots=min(sum(slots), self.grid.size),
            room=all(have >= need for have, need in zip(slots, owned.tolist(), strict=True)),
        )
        return shares

    def _owners(self, routes: Routes, layer: int) -> np.ndarray:
        """[E] which channel a worker would choose for each expert of a layer, if it chose all; negative: none."""
        replicas = routes.replicas[layer]
        if not replicas.replicated:
            return replicas.sole[:-1]
        return choose_fewest_experts(np.ones(self.grid.num_experts, np.int64), replicas, routes.costs())[:-1]
