"""What an attention worker says of itself: status and experts. Reads counters, changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.engine.build import EngineParts
from cluster.config import MoesaicConfig
from cluster.types import ExpertMemoryStatus, ExpertsReport, WorkerStatus

if TYPE_CHECKING:
    from actors.attention_worker import AttentionWorker


def worker_status(worker: AttentionWorker, config: MoesaicConfig) -> WorkerStatus:
    """A snapshot; numbers are zero until the engine exists."""
    parts = worker.parts
    engine = parts.engine if parts else None
    blocks = engine.batcher.blocks if engine else None
    degraded: list[str] = []
    if parts and parts.store.read_mode != "O_DIRECT":
        degraded.append(f"experts are read {parts.store.read_mode}: O_DIRECT is not possible here")
    if parts and parts.compute.plan.label == "torch":
        degraded.append("compiled kernels are missing: plain torch is used (a C compiler is needed at install time)")
    return WorkerStatus(
        worker_id=worker.worker_id,
        phase=worker.phase,
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
        expert_memory=_expert_memory(parts) if parts else None,
        degraded=(*degraded, *worker.statistics.degraded),
    )


def experts_report(worker: AttentionWorker) -> ExpertsReport:
    """Residency and activation per layer; empty until the engine exists."""
    parts = worker.parts
    if parts is None:
        return ExpertsReport(worker_id=worker.worker_id, layers=())
    activations = {layer: counts.tolist() for layer, counts in parts.dispatcher.activations.items()}
    return ExpertsReport(worker_id=worker.worker_id, layers=parts.store.layers_report(activations))


def _expert_memory(parts: EngineParts) -> ExpertMemoryStatus:
    store = parts.store
    return ExpertMemoryStatus(
        budget_bytes=store.budget_bytes,
        resident_bytes=store.num_resident * store.slot_bytes,
        model_expert_bytes=store.model_bytes,
        num_experts=len(store.layout.experts),
        num_resident=store.num_resident,
        hits=store.counters.hits,
        misses=store.counters.misses,
        bytes_read=store.bytes_read,
        stall_s=store.counters.stall_s,
        read_mode=store.read_mode,
        kernel=parts.compute.plan.label,
    )
