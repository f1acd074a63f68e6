"""Every metric of an attention worker, made from its status. Knows names and meanings, not how they are counted."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.types import WorkerStatus


def worker_metrics_text(status: WorkerStatus) -> str:
    """Prometheus text; names follow vLLM's meanings, expert metrics are ours."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))
    return generate_latest(registry).decode()


class _StatusCollector(Collector):
    """One status as metrics; every metric of a worker is declared here."""

    def __init__(self, status: WorkerStatus) -> None:
        self._status = status

    def collect(self) -> list[Metric]:
        s = self._status
        gauges: dict[str, tuple[str, float]] = {
            "moesaic_num_requests_running": ("Sequences in the running batch.", s.num_running),
            "moesaic_num_requests_waiting": ("Sequences that wait for the batch.", s.num_waiting),
            "moesaic_kv_cache_usage_ratio": ("Used share of KV blocks.", s.kv_blocks_used / max(1, s.kv_blocks_total)),
        }
        counters: dict[str, tuple[str, float]] = {
            "moesaic_preemptions": ("Sequences preempted for want of KV blocks.", s.num_preemptions),
            "moesaic_engine_prompt_tokens": ("Prompt tokens taken in.", s.prompt_tokens),
            "moesaic_engine_generation_tokens": ("Tokens generated.", s.generated_tokens),
            "moesaic_prefix_cache_hit_tokens": ("Prompt tokens found in the KV cache.", s.cached_prompt_tokens),
        }
        if s.expert_memory is not None:
            m = s.expert_memory
            gauges |= {
                "moesaic_expert_budget_bytes": ("Bytes the fast tier may hold.", m.budget_bytes),
                "moesaic_expert_resident_bytes": ("Bytes the fast tier holds.", m.resident_bytes),
            }
            counters |= {
                "moesaic_expert_cache_hits": ("Experts found resident.", m.hits),
                "moesaic_expert_cache_misses": ("Experts loaded on demand.", m.misses),
                "moesaic_expert_read_bytes": ("Bytes of experts read from disk.", m.bytes_read),
                "moesaic_expert_stall_seconds": ("Time the step waited for loads.", m.stall_s),
            }
        labels, values = ("worker", "model_name"), (s.worker_id, s.model)
        families: list[Metric] = []
        for kind, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in metrics.items():
                family = kind(name, text, labels=labels)
                family.add_metric(values, value)
                families.append(family)
        return families
