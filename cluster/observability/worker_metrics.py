"""Every metric of attention workers and expert hosts, made from their statuses. Knows names and meanings only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.stats.activation_counts import load_balance
from cluster.types import ClusterActivations, ExpertHostStatus, ExpertMemoryStatus, WorkerStatus

_Values = dict[str, tuple[str, float]]  # name -> help, value
_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)


def worker_metrics_text(
    workers: Sequence[WorkerStatus],
    hosts: Sequence[ExpertHostStatus] = (),
    cluster: ClusterActivations | None = None,
    *,
    per_expert: bool = False,
) -> str:
    """Prometheus text; names follow vLLM's meanings, expert metrics are ours.

    Args:
        cluster: cluster-wide counts, one series per layer and phase; every front end gives the same, so do not add up.
        per_expert: also one per layer, expert and phase.
    """
    registry = CollectorRegistry()
    registry.register(_StatusCollector(workers, hosts))
    if cluster is not None:
        registry.register(_LoadCollector(cluster, per_expert=per_expert))
    return generate_latest(registry).decode()


class _StatusCollector(Collector):
    """Statuses as metrics; the label `process` is the worker's or the host's id."""

    def __init__(self, workers: Sequence[WorkerStatus], hosts: Sequence[ExpertHostStatus]) -> None:
        self._workers = workers
        self._hosts = hosts

    def collect(self) -> list[Metric]:
        gauges: dict[str, GaugeMetricFamily] = {}
        counters: dict[str, CounterMetricFamily] = {}
        for worker in self._workers:
            process = f"worker-{worker.worker_id}"
            _add(gauges, GaugeMetricFamily, process, _worker_gauges(worker) | _memory_gauges(worker.expert_memory))
            _add(
                counters, CounterMetricFamily, process, _worker_counters(worker) | _memory_counts(worker.expert_memory)
            )
        for host in self._hosts:
            _add(gauges, GaugeMetricFamily, host.host_id, _memory_gauges(host.expert_memory))
            _add(counters, CounterMetricFamily, host.host_id, _host_counters(host) | _memory_counts(host.expert_memory))
        return [*gauges.values(), *counters.values()]


class _LoadCollector(Collector):
    """How evenly the gates use the experts, cluster-wide since counting began."""

    def __init__(self, cluster: ClusterActivations, *, per_expert: bool) -> None:
        self._cluster = cluster
        self._per_expert = per_expert

    def collect(self) -> list[Metric]:
        ratio = GaugeMetricFamily(
            "moesaic_expert_load_ratio",
            "Activations of the layer's busiest expert over the mean; 1 is even.",
            labels=("layer", "phase"),
        )
        tokens = CounterMetricFamily(
            "moesaic_expert_tokens", "Tokens whose gate chose the expert.", labels=("layer", "expert", "phase")
        )
        for layer in self._cluster.layers:
            for phase, counts in layer.activations.items():
                balance = load_balance(counts)
                if balance is not None:
                    ratio.add_metric((str(layer.layer), phase), balance)
                for expert, count in enumerate(counts if self._per_expert else ()):
                    tokens.add_metric((str(layer.layer), str(expert), phase), count)
        return [ratio, tokens] if self._per_expert else [ratio]


def _add(families: dict[str, _Family], kind: type[_Family], process: str, values: _Values) -> None:
    for name, (text, value) in values.items():
        if name not in families:
            families[name] = kind(name, text, labels=("process",))
        families[name].add_metric((process,), value)


def _worker_gauges(s: WorkerStatus) -> _Values:
    return {
        "moesaic_num_requests_running": ("Sequences in the running batch.", s.num_running),
        "moesaic_num_requests_waiting": ("Sequences that wait for the batch.", s.num_waiting),
        "moesaic_kv_cache_usage_ratio": ("Used share of KV blocks.", s.kv_blocks_used / max(1, s.kv_blocks_total)),
    }


def _worker_counters(s: WorkerStatus) -> _Values:
    return {
        "moesaic_preemptions": ("Sequences preempted for want of KV blocks.", s.num_preemptions),
        "moesaic_engine_prompt_tokens": ("Prompt tokens taken in.", s.prompt_tokens),
        "moesaic_engine_generation_tokens": ("Tokens generated.", s.generated_tokens),
        "moesaic_prefix_cache_hit_tokens": ("Prompt tokens found in the KV cache.", s.cached_prompt_tokens),
    }


def _memory_gauges(m: ExpertMemoryStatus | None) -> _Values:
    if m is None:
        return {}
    return {
        "moesaic_expert_budget_bytes": ("Bytes the fast tier may hold.", m.budget_bytes),
        "moesaic_expert_resident_bytes": ("Bytes the fast tier holds.", m.resident_bytes),
    }


def _memory_counts(m: ExpertMemoryStatus | None) -> _Values:
    if m is None:
        return {}
    return {
        "moesaic_expert_cache_hits": ("Experts found resident.", m.hits),
        "moesaic_expert_cache_misses": ("Experts loaded on demand.", m.misses),
        "moesaic_expert_read_bytes": ("Bytes of experts read from disk.", m.bytes_read),
        "moesaic_expert_stall_seconds": ("Time the step waited for loads.", m.stall_s),
    }


def _host_counters(s: ExpertHostStatus) -> _Values:
    return {
        "moesaic_dispatch_frames": ("Frames of rows taken in from workers.", s.num_frames),
        "moesaic_dispatch_rows": ("Token rows taken in from workers.", s.num_rows),
        "moesaic_dispatch_batches": ("Batches computed; frames of several workers may share one.", s.num_batches),
        "moesaic_dispatch_refused": ("Frames refused: stale epoch, late or damaged.", s.num_refused),
        "moesaic_expert_host_busy_seconds": ("Time spent computing.", s.busy_s),
    }
