"""Metrics of the scheduler: what is known of prompts, how even the load is, what moved. Knows names and meanings only.

Every front end gives the same values, so do not add them up over front ends.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.status.scheduler import SchedulerStatus


def scheduler_metrics_text(status: SchedulerStatus | None) -> str:
    """Prometheus text. Args: status: None while the scheduler is away."""
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    return generate_latest(registry).decode()


class _Collector(Collector):
    def __init__(self, status: SchedulerStatus | None) -> None:
        self._status = status

    def collect(self) -> list[Metric]:
        status = self._status
        up = GaugeMetricFamily(
            "moesaic_scheduler_up", "Whether the scheduler answers.", value=float(status is not None)
        )
        if status is None:
            return [up]
        ages = GaugeMetricFamily("moesaic_report_age_seconds", "Age of a process's last report.", labels=("process",))
        for worker in status.workers:
            ages.add_metric((f"worker-{worker.worker_id}",), worker.age_s)
        for host in status.hosts:
            ages.add_metric((host.host_id,), host.age_s)
        return [up, ages, *_load(status), *_knowledge(status), *_placement(status)]


def _load(status: SchedulerStatus) -> list[Metric]:
    loads = [worker.num_running + worker.num_waiting for worker in status.workers if not worker.is_draining]
    if not sum(loads):
        return []
    ratio = max(loads) * len(loads) / sum(loads)
    text = "Requests of the busiest attention worker over the mean; 1 is even."
    return [GaugeMetricFamily("moesaic_worker_load_ratio", text, value=ratio)]


def _knowledge(status: SchedulerStatus) -> list[Metric]:
    known = status.knowledge
    if known is None:
        return []
    information = "Bits per layer that the kind of prompt tells of the expert; about 0: routing by kind gains nothing."
    return [
        GaugeMetricFamily("moesaic_prompt_expert_information_bits", information, value=known.mutual_information),
        GaugeMetricFamily("moesaic_prompt_clusters", "Kinds of prompt that are told apart.", value=known.num_clusters),
        GaugeMetricFamily("moesaic_knowledge_age_seconds", "Since knowledge last changed.", value=known.age_s),
    ]


def _placement(status: SchedulerStatus) -> list[Metric]:
    line = status.placement
    metrics: list[Metric] = [
        GaugeMetricFamily("moesaic_expert_placement_epoch", "Of the published placement.", value=line.epoch),
        CounterMetricFamily("moesaic_expert_rebalance", "Migrations begun.", value=line.num_migrations),
        CounterMetricFamily("moesaic_expert_rebalance_aborted", "Migrations given up.", value=line.num_aborted),
        CounterMetricFamily("moesaic_expert_rebalance_bytes", "Bytes of experts moved.", value=line.bytes_moved),
    ]
    if line.balance:
        text = "Mean over largest load of expert hosts, by the last plan; 1 is even."
        metrics.append(GaugeMetricFamily("moesaic_expert_balancedness", text, value=1 / line.balance))
    return metrics
