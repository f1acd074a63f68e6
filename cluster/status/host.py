"""What one expert host says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cluster.status.expert_memory import ExpertMemoryStatus
from cluster.status.fields import Row, Unit, counter, fact
from cluster.types import StartupPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertHostStatus:
    """One expert host now; counts are since start."""

    host_id: Annotated[str, fact("Unique in the cluster; another at every start.")]
    phase: Annotated[StartupPhase, fact("What it is doing.")]
    error: Annotated[str | None, fact("Why it failed.")]
    epoch: Annotated[int, fact("Of the placement that it serves.")]
    owned: Annotated[int, fact("Experts that the placement gives it.")]
    num_connections: Annotated[int, fact("Attention workers connected now.")]
    num_frames: Annotated[int, counter("moesaic_dispatch_frames", "Frames of rows taken in from workers.")]
    num_rows: Annotated[int, counter("moesaic_dispatch_rows", "Token rows taken in from workers.")]
    num_batches: Annotated[
        int, counter("moesaic_dispatch_batches", "Batches computed; frames of several workers may share one.")
    ]
    num_refused: Annotated[int, counter("moesaic_dispatch_refused", "Frames refused: stale epoch, late or damaged.")]
    busy_s: Annotated[float, counter("moesaic_expert_host_busy_seconds", "Time spent computing.", Unit.SECONDS)]
    expert_memory: ExpertMemoryStatus | None
    degraded: Annotated[tuple[str, ...], fact("What works only in part, in words.")] = ()


HOST_ROWS: tuple[Row, ...] = (
    ("phase", "{phase}"),
    ("owned experts", "{owned} (epoch {epoch})"),
    ("frames / rows", "{num_frames} / {num_rows}"),
)
"""What the command line shows of it, before its expert memory."""
