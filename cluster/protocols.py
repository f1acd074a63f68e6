"""Protocols for every effect: what the front ends and the control plane call, never how it is done."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple, Protocol

from cluster.types import (
    ExpertHostStatus,
    ExpertsReport,
    GenerationRequest,
    Phase,
    RequestId,
    TokenChunk,
    WorkerStatus,
)


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
            ConfigError: `setting` is no size or percentage, or holds fewer experts than one token needs.
            Unavailable: no worker has such a memory, or none answers.
        """
        ...


class LearnedShare(NamedTuple):
    """What one worker learned: its id, how much went into it (steps), and the state as actors/experts writes it."""

    owner: str
    weight: int
    blob: bytes


class StateStore(Protocol):
    """Aggregated activation statistics and learned state, shared by all processes of a cluster.

    Never on the token path. Implementations raise `ConnectionError` when they cannot be reached.
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

    def publish_learned(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """Leave a worker's share of a kind of state for others; replaces its last one.

        Kept are the shares of the last few workers that published, for about a day (cluster/stats/learned_shares.py).

        Raises:
            ValueError: the share is too large; says the bound.
        """
        ...

    def read_learned(self, fingerprint: str, name: str) -> list[LearnedShare]:
        """Shares of a kind of state of the model `fingerprint`, the last published first."""
        ...
