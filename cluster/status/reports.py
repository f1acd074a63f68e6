"""What workers and hosts tell the scheduler once a second, and what it answers. Values only.

A report is the sign of life: health is what `steps` says of progress, not an open connection. Residency travels as
bits (np.packbits over layer-major experts, L * E of them), so that a report of a large model is some kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.placement.plan import Placement
from cluster.semantics.knowledge import Knowledge
from cluster.types import StartupPhase, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """One attention worker now. Times in seconds; `resident`, `ram_resident`: bits, empty when nothing is held.

    replica_id: of its Serve replica. step_s: a recent decode step's; prefill_token_s: a recent prompt token's.
    stalled_s: since the last step ended, while there is work. waiting_tokens: prompt tokens not yet computed.
    miss_s: measured cost of one expert by the tier or place it comes from. placement_epoch: which its steps follow.
    mix: what its requests are expected to use (RequestMix.to_bytes), empty while nothing is known.
    clusters_version: of the knowledge, by which it counts.
    """

    worker_id: str
    replica_id: str
    node_id: str
    phase: StartupPhase
    layers: tuple[int, ...] = ()
    num_experts: int = 0
    top_k: int = 0
    num_running: int = 0
    num_waiting: int = 0
    max_open: int = 0
    waiting_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    prefill_token_s: float = 0.0
    stalled_s: float = 0.0
    resident: bytes = b""
    ram_resident: bytes = b""
    mix: bytes = b""
    miss_s: Mapping[Tier, float] = field(default_factory=dict[Tier, float])
    misses: int = 0
    stall_s: float = 0.0
    knowledge_version: int = 0
    clusters_version: int = 0
    placement_epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """One expert host now. `index` names it in placements, `host_id` its incarnation (a new one at every start).

    capacity: experts that its fast tier holds. expert_s, row_s: measured time of one distinct expert and of one row in
    a batch. miss_s: of getting an expert that is not in the fast tier, by where it lies. stall_s: of busy_s, spent
    waiting for such experts. epochs: of the placements whose frames it takes (two while a migration is under way).
    """

    host_id: str
    index: int
    node_id: str
    phase: StartupPhase
    epochs: tuple[int, ...] = ()
    capacity: int = 0
    ram_capacity: int = 0
    expert_bytes: int = 0
    resident: bytes = b""
    expert_s: float = 0.0
    row_s: float = 0.0
    miss_s: Mapping[Tier, float] = field(default_factory=dict[Tier, float])
    num_rows: int = 0
    num_batches: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDirectives:
    """The scheduler's answer to a worker: what is newer than what it reported, else None.

    is_draining: take no more requests; those under way go on.
    """

    knowledge: Knowledge | None = None
    placement: Placement | None = None
    is_draining: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingView:
    """What a router decides by: each worker's last report and its age in seconds; draining workers are left out."""

    workers: tuple[tuple[WorkerReport, float], ...]
    knowledge: Knowledge | None
