"""Every metric of attention workers and expert hosts, made from their statuses. Knows names and meanings only."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.observability.expert_metrics import MetricFamilies, add_memory
from cluster.stats.activation_counts import load_balance
from cluster.types import ClusterActivations, ExpertHostStatus, WorkerStatus


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
        families = MetricFamilies()
        for worker in self._workers:
            process = f"worker-{worker.worker_id}"
            _add_worker(families, process, worker)
            add_memory(families, process, worker.expert_memory)
        for host in self._hosts:
            _add_host(families, host)
            add_memory(families, host.host_id, host.expert_memory)
        return families.all()


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


def _add_worker(families: MetricFamilies, process: str, s: WorkerStatus) -> None:
    kv_usage = s.kv_blocks_used / max(1, s.kv_blocks_total)
    families.gauge("moesaic_num_requests_running", "Sequences in the running batch.", process, s.num_running)
    families.gauge("moesaic_num_requests_waiting", "Sequences that wait for the batch.", process, s.num_waiting)
    families.gauge("moesaic_kv_cache_usage_ratio", "Used share of KV blocks.", process, kv_usage)
    families.count("moesaic_preemptions", "Sequences preempted for want of KV blocks.", process, s.num_preemptions)
    families.gauge("moesaic_failed_steps", "Steps in a row that gave no token.", process, s.failed_steps)
    families.count("moesaic_engine_prompt_tokens", "Prompt tokens taken in.", process, s.prompt_tokens)
    families.count("moesaic_engine_generation_tokens", "Tokens generated.", process, s.generated_tokens)
    families.count(
        "moesaic_prefix_cache_hit_tokens", "Prompt tokens found in the KV cache.", process, s.cached_prompt_tokens
    )


def _add_host(families: MetricFamilies, s: ExpertHostStatus) -> None:
    batches = "Batches computed; frames of several workers may share one."
    families.count("moesaic_dispatch_frames", "Frames of rows taken in from workers.", s.host_id, s.num_frames)
    families.count("moesaic_dispatch_rows", "Token rows taken in from workers.", s.host_id, s.num_rows)
    families.count("moesaic_dispatch_batches", batches, s.host_id, s.num_batches)
    families.count(
        "moesaic_dispatch_refused", "Frames refused: stale epoch, late or damaged.", s.host_id, s.num_refused
    )
    families.count("moesaic_expert_host_busy_seconds", "Time spent computing.", s.host_id, s.busy_s)
