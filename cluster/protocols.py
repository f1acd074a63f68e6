"""Protocols for every effect: what the front ends and the control plane call, never how it is done."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cluster.semantics.statistics import ExpertStatistics
from cluster.status.experts import ExpertsReport
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus
from cluster.types import GenerationRequest, Phase, RequestId, TokenChunk

if TYPE_CHECKING:
    from cluster.placement.plan import PlacementPlan
    from cluster.status.diagnosis import Diagnosis
    from cluster.status.scheduler import DrainLine, SchedulerStatus


class AttentionWorkerClient(Protocol):
    """The attention worker(s) behind a front end."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream the tokens of one sequence; closing the iterator early aborts the sequence.

        The first chunk may have no tokens: then it tells that a worker has taken the sequence.

        Raises:
            Overloaded: the worker's queue is full (before the first chunk).
            Unavailable: the worker is starting, draining or gone.
        """
        ...

    async def abort(self, request_id: RequestId) -> None:
        """Stop a sequence within one step and free its memory; unknown ids are ignored."""
        ...

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        """What each worker says of itself, also while it loads; one that does not answer is left out.

        Raises:
            Unavailable: none answers.
        """
        ...

    async def host_statuses(self) -> tuple[ExpertHostStatus, ...]:
        """What each expert host says of itself; one that does not answer is shown as failed."""
        ...

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        """Residency and activation of experts per layer, of each worker and then of each host."""
        ...

    async def set_expert_cache(self, setting: str) -> tuple[WorkerStatus, ...]:
        """Change every worker's fast expert memory while it serves; what each says of itself then.

        Raises:
            InvalidRequest: `setting` is no size or percentage, holds fewer experts than one token needs, or is more
                than fits; names the least or the largest.
            NothingToChange: workers have no such memory.
            Unavailable: none answers.
        """
        ...


class PolicyStateShare(NamedTuple):
    """What one worker learned: its id, how much went into it (steps), and the state as actors/experts writes it."""

    owner: str
    weight: int
    blob: bytes


class VersionedState(NamedTuple):
    """What the scheduler left to remember: a number that only grows, and the state as its owner writes it."""

    version: int
    blob: bytes


class StateStore(Protocol):
    """Aggregated activation statistics and policy state, shared by all processes of a cluster.

    Never on the token path. Implementations raise `ConnectionError` when they cannot be reached. Two kinds of counts:
    `activations` are exact and only grow, for people; `statistics` fade and know clusters of prompts, for decisions.
    """

    @property
    def description(self) -> str:
        """For people: `redis://host:port` or `in-memory (degraded: not shared)`."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether other processes see what is written here."""
        ...

    def ping(self) -> None:
        """Return if the store answers."""
        ...

    def add_activations(self, fingerprint: str, deltas: Mapping[Phase, Mapping[int, Mapping[int, int]]]) -> None:
        """Add activation counts, `deltas[phase][layer][expert]`, to those of the model `fingerprint`."""
        ...

    def activations(self, fingerprint: str) -> dict[Phase, dict[int, dict[int, int]]]:
        """Total activation counts by phase, layer and expert; what was never chosen may be missing."""
        ...

    def publish_policy_state(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """Leave a worker's share of a kind of state for others; replaces its last one.

        Kept are the shares of the last few workers that published, for about a day (see policy_state_shares.py).

        Raises:
            ValueError: the share is too large; says the bound.
        """
        ...

    def read_policy_states(self, fingerprint: str, name: str) -> list[PolicyStateShare]:
        """Shares of a kind of state of the model `fingerprint`, the last published first."""
        ...

    def add_statistics(
        self, fingerprint: str, delta: ExpertStatistics, prompts: Sequence[bytes], *, half_life_s: float
    ) -> None:
        """Add activations counted just now to the decayed sums of their version of the clusters, all or none.

        Kept are the newest two versions; what is of an older one is dropped.

        Args:
            prompts: embeddings of some prompts that came since the last call (cluster/stats/recent_prompts.py).
        Raises:
            ValueError: another shape than the version had before, or an embedding too long.
        """
        ...

    def statistics(self, fingerprint: str, clusters_version: int, *, half_life_s: float) -> ExpertStatistics | None:
        """Decayed sums of all workers as of now; None if there is nothing of that version."""
        ...

    def recent_prompts(self, fingerprint: str) -> list[bytes]:
        """Embeddings of the last prompts that workers sent, the latest first."""
        ...

    def take_fence(self, fingerprint: str) -> None:
        """Be the one writer of states from now on: what is put through another store that did so earlier, or never, is
        refused. A scheduler does it once."""
        ...

    def put_state(self, fingerprint: str, name: str, blob: bytes, version: int) -> bool:
        """Keep a state unless one of this or a later version is kept; whether it was taken.

        To put the same version again is harmless, and makes good what a restarted server lost.

        Raises:
            Superseded: another writer has taken the fence since.
        """
        ...

    def get_state(self, fingerprint: str, name: str) -> VersionedState | None:
        """The state of the highest version that was put."""
        ...


class SchedulerClient(Protocol):
    """The scheduler, for pages and people. Every method raises Unavailable while it is away."""

    async def status(self) -> SchedulerStatus:
        """What it knows of workers, hosts, prompts and placement."""
        ...

    async def plan(self) -> PlacementPlan:
        """What it would move now; nothing is moved.

        Raises:
            Unavailable: there are no expert hosts, or not enough is known yet.
        """
        ...

    async def diagnose(self) -> Diagnosis:
        """What routing and placement could gain, from the statistics so far."""
        ...

    async def drain(self, node: str) -> DrainLine:
        """Empty a node: nothing new goes there, and its hosts' experts move away; what is left there now.

        Raises:
            InvalidRequest: no such node; names those there are.
        """
        ...

    async def undrain(self, node: str) -> DrainLine:
        """Use a node again. Raises as `drain`."""
        ...


class FrontEnds(Protocol):
    """All front ends of the application, HTTP and gRPC: what a client asks of one may be held by another."""

    async def abort_answers(self, names: tuple[str, ...]) -> tuple[frozenset[str], int]:
        """End the answers of those names, wherever they are given.

        Returns:
            The names that had a running sequence, and how many front ends did not say in time.
        """
        ...
