"""Protocols for every effect: what the front ends and the control plane call, never how it is done."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from cluster.types import ExpertsReport, GenerationRequest, RequestId, TokenChunk, WorkerStatus


class AttentionWorkerClient(Protocol):
    """The attention worker(s) behind a front end."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream the tokens of one sequence; closing the iterator early aborts the sequence.

        Raises:
            Overloaded: the worker's queue is full (before the first chunk).
            Unavailable: the worker is starting, draining or gone.
        """
        ...

    async def abort(self, request_id: RequestId) -> None:
        """Stop a sequence within one step and free its memory; unknown ids are ignored."""
        ...

    async def status(self) -> WorkerStatus:
        """What the worker says of itself; answers in every phase, also while loading."""
        ...

    async def experts(self) -> ExpertsReport:
        """Residency and activation of experts, per layer."""
        ...

    async def metrics_text(self) -> str:
        """The worker's own metrics in Prometheus text format."""
        ...


class StateStore(Protocol):
    """Aggregated activation statistics, shared by all processes of a cluster.

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

    def add_activations(self, fingerprint: str, deltas: Mapping[int, Mapping[int, int]]) -> None:
        """Add activation counts, `deltas[layer][expert]`, to those of the model `fingerprint`."""
        ...

    def activations(self, fingerprint: str) -> dict[int, dict[int, int]]:
        """Total activation counts by layer and expert."""
        ...
