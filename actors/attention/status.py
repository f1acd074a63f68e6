"""What an attention worker says of itself: status and experts. Reads counters, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.expert_client.dispatch import HostDispatcher
from actors.experts.memory.report import layers_report
from actors.experts.report import memory_status
from cluster.config.load import MoesaicConfig
from cluster.config.sections import ExpertsConfig
from cluster.status.expert_memory import ExpertMemoryStatus
from cluster.status.experts import ExpertsReport, LayerExperts
from cluster.status.worker import DataPlaneStatus, WorkerStatus
from cluster.types import Phase, StartupPhase

if TYPE_CHECKING:
    from actors.attention.worker import AttentionWorker
    from actors.engine.loaded_engine import LoadedEngine


def worker_status(worker: AttentionWorker, config: MoesaicConfig) -> WorkerStatus:
    """A snapshot; numbers are zero until the engine exists."""
    parts = worker.parts
    engine = parts.engine if parts else None
    blocks = engine.batcher.blocks if engine else None
    degraded = [*worker.failed_steps.degraded]
    if parts and parts.backend and parts.backend.store.read_mode != "O_DIRECT":
        degraded.append(f"experts are read {parts.backend.store.read_mode}: O_DIRECT is not possible here")
    if parts and parts.links:
        degraded.extend(parts.links.degraded)
    if parts and parts.backend:
        degraded.extend(parts.backend.store.problems)
    if parts and parts.policy_runner and parts.policy_runner.problem:
        degraded.append(parts.policy_runner.problem)
    if parts:
        degraded.extend(parts.problems)
    if parts and parts.kernel == "torch":
        degraded.append("compiled kernels are missing: plain torch is used (a C compiler is needed at install time)")
    return WorkerStatus(
        worker_id=worker.worker_id,
        phase=StartupPhase.DRAINING if worker.is_draining else worker.phase,
        error=worker.error.message if worker.error else None,
        model=worker.info.name,
        dtype=str(parts.dtype).removeprefix("torch.") if parts else config.model.dtype,
        max_model_len=worker.info.max_model_len,
        num_running=engine.batcher.num_running if engine else 0,
        num_waiting=engine.batcher.num_waiting if engine else 0,
        kv_blocks_total=blocks.num_blocks if blocks else 0,
        kv_blocks_used=blocks.num_used if blocks else 0,
        num_preemptions=engine.batcher.num_preemptions if engine else 0,
        generated_tokens=engine.counters.generated_tokens if engine else 0,
        prompt_tokens=engine.counters.prompt_tokens if engine else 0,
        cached_prompt_tokens=engine.counters.cached_prompt_tokens if engine else 0,
        expert_memory=_memory(parts, config.experts) if parts else None,
        data_plane=_data_plane(parts.dispatcher) if parts and isinstance(parts.dispatcher, HostDispatcher) else None,
        degraded=(*degraded, *worker.statistics.degraded, *worker.learned.degraded),
        failed_steps=worker.failed_steps.in_a_row,
        is_failing=worker.failed_steps.is_failing,
    )


async def experts_report(worker: AttentionWorker) -> ExpertsReport:
    """Residency and activation per layer, this worker's and the cluster's; empty until the engine exists."""
    parts = worker.parts
    if parts is None:
        return ExpertsReport(owner_id=worker.worker_id, layers=())
    activations = {
        layer: {phase: tuple(row) for phase, row in zip(Phase, counts.tolist(), strict=True)}
        for layer, counts in parts.recorder.counts.items()
    }
    num_experts = next(iter(parts.recorder.counts.values())).shape[1]
    if parts.backend is not None:
        layers = layers_report(parts.backend.store, activations)
    else:
        layers = tuple(
            LayerExperts(layer=layer, num_experts=num_experts, resident=(), activations=by_phase, hits=0, misses=0)
            for layer, by_phase in activations.items()
        )
    return ExpertsReport(
        owner_id=worker.worker_id,
        layers=layers,
        cluster=await worker.cluster_counts.read(tuple(activations), num_experts),
    )


def _memory(parts: LoadedEngine, config: ExpertsConfig) -> ExpertMemoryStatus | None:
    """Of this process. Beside hosts it takes what is used most, whatever policies say: they speak to the hosts."""
    if parts.backend is None:
        return None
    runner = parts.policy_runner if parts.links is None else None
    if runner is None:
        return memory_status(parts.backend, config)
    return memory_status(parts.backend, config, hears=True, search_share=runner.search_share)


def _data_plane(dispatcher: HostDispatcher) -> DataPlaneStatus:
    counters = dispatcher.counters
    return DataPlaneStatus(
        carriers=dispatcher.links.carriers,
        layers=counters.layers,
        frames=counters.frames,
        rows=counters.rows,
        wait_s=counters.wait_s,
        send_s=counters.send_s,
        host_s=counters.host_s,
        redispatched=counters.redispatched,
        fallbacks=counters.fallbacks,
        hosts_lost=dispatcher.links.num_lost,
    )
