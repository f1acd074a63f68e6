"""What the scheduler says of itself: values for pages, metrics and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cluster.placement.snapshot import Snapshot
from cluster.status.fields import Unit, counter, fact, gauge, label
from cluster.types import StartupPhase

_age = gauge("moesaic_report_age_seconds", "Age of a process's last report.", Unit.SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """An attention worker by its last report, `age_s` old. resident: experts in its fast tier."""

    worker_id: str
    replica_id: str
    node_id: str
    phase: StartupPhase
    age_s: Annotated[float, _age]
    is_draining: bool
    num_running: int
    num_waiting: int
    waiting_tokens: int
    steps: int
    step_s: float
    stalled_s: float
    resident: int
    knowledge_version: int
    placement_epoch: int

    @property
    def process(self) -> Annotated[str, label("process", "The worker, as in its own metrics.")]:
        """`worker-` and its id."""
        return f"worker-{self.worker_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLine:
    """An expert host by its last report. owned: experts that the placement gives it, None if the
    scheduler places none; busy_s: since start."""

    host_id: Annotated[str, label("process", "The host, as in its own metrics.")]
    index: int
    node_id: str
    phase: StartupPhase
    age_s: Annotated[float, _age]
    is_draining: bool
    owned: int | None
    resident: int
    capacity: int
    epochs: tuple[int, ...]
    busy_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KnowledgeLine:
    """What is known of prompts. mutual_information: bits per layer; support: decayed decoded tokens behind it."""

    version: int
    clusters_version: int
    num_clusters: Annotated[int, gauge("moesaic_prompt_clusters", "Kinds of prompt that are told apart.")]
    age_s: Annotated[float, gauge("moesaic_knowledge_age_seconds", "Since knowledge last changed.", Unit.SECONDS)]
    mutual_information: Annotated[
        float,
        gauge(
            "moesaic_prompt_expert_information_bits",
            "Bits per layer that the kind of prompt tells of the expert; about 0: routing by kind gains nothing.",
        ),
    ]
    support: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementLine:
    """Placement and migration since this scheduler started, unless it says otherwise.

    reason: of the last plan, why it was applied or not, `plan_age_s` ago. balance: largest over mean load of hosts now,
    None before anything is known of it. migration: what is under way, in words; empty for nothing.
    """

    epoch: Annotated[int, gauge("moesaic_expert_placement_epoch", "Of the published placement.")]
    num_plans: Annotated[int, fact("Placements planned.")] = 0
    num_migrations: Annotated[int, counter("moesaic_expert_rebalance", "Migrations begun.")] = 0
    num_aborted: Annotated[int, counter("moesaic_expert_rebalance_aborted", "Migrations given up.")] = 0
    bytes_moved: Annotated[int, counter("moesaic_expert_rebalance_bytes", "Bytes of experts moved.", Unit.BYTES)] = 0
    balance: float | None = None
    reason: str = ""
    migration: str = ""
    plan_age_s: float | None = None

    @property
    def balancedness(
        self,
    ) -> Annotated[
        float | None,
        gauge("moesaic_expert_balancedness", "Mean over largest load of expert hosts, by the last plan; 1 is even."),
    ]:
        """None before anything is known of it."""
        return 1 / self.balance if self.balance else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainLine:
    """A node that is being emptied, and what is still there, in words; nothing left: `is_empty`."""

    node_id: str
    is_empty: bool
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStatus:
    """The scheduler now. `degraded` lists what works only in part, in words. snapshot: of knowledge and balance."""

    uptime_s: float
    routing: str
    placement_mode: str
    workers: tuple[WorkerLine, ...] = ()
    hosts: tuple[HostLine, ...] = ()
    knowledge: KnowledgeLine | None = None
    placement: PlacementLine
    drains: tuple[DrainLine, ...] = ()
    degraded: tuple[str, ...] = ()
    snapshot: Snapshot | None = None

    @property
    def load_ratio(
        self,
    ) -> Annotated[
        float | None,
        gauge("moesaic_worker_load_ratio", "Requests of the busiest attention worker over the mean; 1 is even."),
    ]:
        """Of workers that are not draining; None while there are no requests."""
        loads = [worker.num_running + worker.num_waiting for worker in self.workers if not worker.is_draining]
        return max(loads) * len(loads) / sum(loads) if sum(loads) else None
