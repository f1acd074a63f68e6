"""One attention worker's side of the exchange: what it reports, and how it follows the answer.

Reads counters of the engine and sets what the engine reads at its next step; called by the report loop's thread. Knows
reports and directives; knows no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from actors.expert_client.dispatch import HostDispatcher
from cluster.config.load import MoesaicConfig
from cluster.errors import Unavailable
from cluster.status.reports import WorkerDirectives, WorkerReport
from cluster.types import StartupPhase, Tier

if TYPE_CHECKING:
    from actors.attention.worker import AttentionWorker
    from actors.engine.loaded_engine import LoadedEngine
    from actors.experts.memory.store import ExpertStore


class WorkerReporter:
    """Reports of one worker. `replica_id` and `node_id` are Ray's names of where it runs."""

    def __init__(
        self,
        worker: AttentionWorker,
        config: MoesaicConfig,
        send: Callable[[WorkerReport], WorkerDirectives],
        *,
        replica_id: str,
        node_id: str,
    ) -> None:
        """Args: send: to the scheduler and back, bounded; raises MoesaicError where there was no answer."""
        self._worker = worker
        self._config = config
        self._send = send
        self._replica_id, self._node_id = replica_id, node_id
        self._knowledge_version = self._clusters_version = 0

    def tell(self) -> None:
        """One exchange: a report out, directives in and followed."""
        directives = self._send(self.report())
        if directives.knowledge is not None:
            self._worker.set_knowledge(directives.knowledge)
            self._knowledge_version = directives.knowledge.version
            self._clusters_version = directives.knowledge.clusters_version
        parts = self._worker.parts
        if directives.placement is not None and parts is not None and parts.links is not None:
            parts.links.set_placement(directives.placement)
        self._worker.is_draining = directives.is_draining

    def check_progress(self) -> None:
        """Return if this worker moves, or may yet.

        Far beyond the bound at which front ends give up on it: an expert that does not come fails by a deadline of its
        own, and a chunk of a prompt may take as long within one layer. Whoever is still then is started anew.

        Raises:
            Unavailable: it has had work and moved nothing for too long, or all its steps have failed for too long.
        """
        if self._worker.failed_steps.is_given_up:
            raise Unavailable(self._worker.failed_steps.degraded[0])
        progress = self._worker.progress()
        experts, parts = self._config.experts, self._worker.parts
        limit_s = progress.allowed_s + max(experts.load_timeout_s, experts.host_timeout_s)
        if parts is not None:
            limit_s += parts.engine.times.prefill_token_s * self._config.attention.max_batch_tokens
        if progress.stalled_s > limit_s:
            raise Unavailable(f"the worker has work and moved nothing for {progress.stalled_s:.0f} s")

    def report(self) -> WorkerReport:
        """This worker now; start-up is told, too."""
        worker, parts = self._worker, self._worker.parts
        if parts is None:
            return WorkerReport(
                worker_id=worker.worker_id, replica_id=self._replica_id, node_id=self._node_id, phase=worker.phase
            )
        batcher, times = parts.engine.batcher, parts.engine.times
        store = parts.backend.store if parts.backend else None
        counters = store.counters if store else None
        layers = parts.layout.layers
        num_running = batcher.num_running
        return WorkerReport(
            worker_id=worker.worker_id,
            replica_id=self._replica_id,
            node_id=self._node_id,
            phase=StartupPhase.DRAINING if worker.is_draining else worker.phase,
            layers=layers,
            num_experts=parts.layout.num_experts,
            top_k=parts.top_k,
            num_running=num_running,
            num_waiting=max(batcher.num_waiting, worker.num_open - num_running),
            max_open=worker.max_open,
            waiting_tokens=batcher.waiting_tokens,
            steps=parts.engine.counters.steps,
            step_s=times.decode_s,
            prefill_token_s=times.prefill_token_s,
            stalled_s=worker.progress().stalled_s,
            resident=_bits([store.resident(layer) for layer in layers]) if store else b"",
            ram_resident=_bits([store.in_ram(layer) for layer in layers]) if store and store.ram_budget_bytes else b"",
            mix=batcher.co_batching.mix.to_bytes(),
            miss_s=_miss_s(parts, store),
            misses=counters.num_misses if counters else 0,
            stall_s=counters.total_stall_s if counters else 0.0,
            knowledge_version=self._knowledge_version,
            clusters_version=self._clusters_version,
            placement_epoch=parts.links.epoch if parts.links else 0,
        )


def _miss_s(parts: LoadedEngine, store: ExpertStore | None) -> dict[Tier, float]:
    """What one expert that is not in the fast tier costs, by where it comes from; only what was measured."""
    costs = store.miss_s() if store else {}
    dispatcher = parts.dispatcher
    if isinstance(dispatcher, HostDispatcher) and dispatcher.counters.rows:
        # A row waits for its host as a whole: its share of an expert is a k-th of that.
        counters = dispatcher.counters
        costs[Tier.REMOTE] = counters.wait_s / counters.layers / parts.top_k
    return costs


def _bits(rows: Sequence[np.ndarray]) -> bytes:
    """Layer-major bits of which experts are there."""
    return np.packbits(np.concatenate(rows)).tobytes()
