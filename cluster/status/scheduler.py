"""What the scheduler says of itself: values for pages, metrics and the command line."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.placement.snapshot import Snapshot
from cluster.types import StartupPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLine:
    """An attention worker by its last report, `age_s` old. resident: experts in its fast tier."""

    worker_id: str
    replica_id: str
    node_id: str
    phase: StartupPhase
    age_s: float
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLine:
    """An expert host by its last report. owned: experts that the placement gives it, None if the
    scheduler places none; busy_s: since start."""

    host_id: str
    index: int
    node_id: str
    phase: StartupPhase
    age_s: float
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
    num_clusters: int
    age_s: float
    mutual_information: float
    support: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementLine:
    """Placement and migration since this scheduler started, unless it says otherwise.

    reason: of the last plan, why it was applied or not, `plan_age_s` ago. balance: largest over mean load of hosts now,
    None before anything is known of it. migration: what is under way, in words; empty for nothing.
    """

    epoch: int
    num_plans: int = 0
    num_migrations: int = 0
    num_aborted: int = 0
    bytes_moved: int = 0
    balance: float | None = None
    reason: str = ""
    migration: str = ""
    plan_age_s: float | None = None


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
