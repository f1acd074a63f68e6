"""What one process says of its experts: memory, policies, kernels. Reads counters, changes nothing."""

from __future__ import annotations

import numpy as np

from actors.experts.backend import ExpertBackend
from actors.experts.memory.counters import MemoryCounters
from actors.experts.memory.report import tiers_report
from cluster.config.sections import ExpertsConfig
from cluster.policies.build import WITHOUT_GATES
from cluster.status.expert_memory import CalibrationBin, ExpertMemoryStatus


def memory_status(
    backend: ExpertBackend, config: ExpertsConfig, *, hears: bool = False, search_share: float = 0.0
) -> ExpertMemoryStatus:
    """One process's expert memory. Args: hears: what gates say comes to it. search_share: of the steps' time."""
    store, counters = backend.store, backend.store.counters
    needs_gates = config.eviction not in WITHOUT_GATES
    return ExpertMemoryStatus(
        eviction=config.eviction if hears or not needs_gates else "lru",
        prediction=config.prediction if hears else "none",
        tiers=tiers_report(store),
        budget_bytes=store.budget_bytes,
        resident_bytes=store.num_resident * store.slot_bytes,
        model_expert_bytes=store.model_bytes,
        num_experts=store.grid.size,
        num_resident=store.num_resident,
        hits=int(counters.hits.sum()),
        misses=counters.num_misses,
        misses_by_tier={tier: int(counts.sum()) for tier, counts in counters.misses.items()},
        late=int(counters.late.sum()),
        prefetch_used=int(counters.prefetch_used.sum()),
        prefetch_wasted=int(counters.prefetch_wasted.sum()),
        prefetch_dropped=int(counters.prefetch_dropped.sum()),
        prefetch_bytes={**counters.prefetch_bytes},
        bytes_read=store.bytes_read,
        stall_s=float(counters.stall_s.sum()),
        search_share=search_share,
        calibration=calibration(counters),
        read_mode=store.read_mode,
        kernel=backend.compute.plan.label,
        view_bytes=store.view_bytes,
    )


def calibration(counters: MemoryCounters) -> tuple[CalibrationBin, ...]:
    """Mean forecast and share that came true of every bin, 0 where it had none; nothing without forecasts."""
    if not counters.num_forecasts.any():
        return ()
    counts = np.maximum(counters.num_forecasts, 1)
    means, shares = counters.predicted / counts, counters.came_true / counts
    return tuple(
        CalibrationBin(predicted=mean, observed=share, count=count)
        for mean, share, count in zip(means.tolist(), shares.tolist(), counters.num_forecasts.tolist(), strict=True)
    )
