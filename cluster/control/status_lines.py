"""Reports turned into what the scheduler's page shows. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.control.roster import Roster
from cluster.semantics.knowledge import Knowledge
from cluster.status.reports import HostReport, WorkerReport
from cluster.status.scheduler import DrainLine, HostLine, KnowledgeLine, WorkerLine


def worker_line(report: WorkerReport, age_s: float, roster: Roster) -> WorkerLine:
    """A worker by its last report."""
    return WorkerLine(
        worker_id=report.worker_id,
        replica_id=report.replica_id,
        node_id=report.node_id,
        phase=report.phase,
        age_s=age_s,
        is_draining=roster.is_draining(report.node_id),
        num_running=report.num_running,
        num_waiting=report.num_waiting,
        waiting_tokens=report.waiting_tokens,
        steps=report.steps,
        step_s=report.step_s,
        stalled_s=report.stalled_s,
        resident=_num_set(report.resident),
        knowledge_version=report.knowledge_version,
        placement_epoch=report.placement_epoch,
    )


def host_line(report: HostReport, age_s: float, roster: Roster, owned: int | None) -> HostLine:
    """A host by its last report. Args: owned: experts by the placement; None where there is none."""
    return HostLine(
        host_id=report.host_id,
        index=report.index,
        node_id=report.node_id,
        phase=report.phase,
        age_s=age_s,
        is_draining=roster.is_leaving(report),
        owned=owned,
        resident=_num_set(report.resident),
        capacity=report.capacity,
        epochs=report.epochs,
        busy_s=report.busy_s,
    )


def knowledge_line(knowledge: Knowledge, age_s: float) -> KnowledgeLine:
    """Knowledge in a few numbers."""
    return KnowledgeLine(
        version=knowledge.version,
        clusters_version=knowledge.clusters_version,
        num_clusters=len(knowledge.centroids),
        age_s=age_s,
        mutual_information=knowledge.mutual_information,
        support=float(knowledge.support.sum()),
    )


def drain_line(node_id: str, roster: Roster, owned: Mapping[int, int] | str, now_s: float) -> DrainLine:
    """What is left on a node that is being emptied. Args: owned: experts by host; or why hosts keep theirs."""
    left = [
        f"worker {report.worker_id}: {report.num_running} running, {report.num_waiting} waiting"
        for report, _ in roster.workers(now_s)
        if report.node_id == node_id and report.num_running + report.num_waiting
    ]
    for report, _ in roster.hosts(now_s):
        if report.node_id != node_id:
            continue
        if isinstance(owned, str):
            left.append(f"expert host {report.index}: {owned}")
        elif owned.get(report.index):
            left.append(f"expert host {report.index}: {owned[report.index]} experts")
        elif len(report.epochs) > 1:
            left.append(f"expert host {report.index}: workers have not all left it")
    return DrainLine(node_id=node_id, is_empty=not left, left=tuple(left))


def _num_set(bits: bytes) -> int:
    return int.from_bytes(bits, "big").bit_count()
