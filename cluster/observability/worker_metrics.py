"""Every metric of attention workers, expert hosts and the load of experts, as their statuses declare them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.observability.families import text_of
from cluster.stats.activation_counts import load_balance
from cluster.status.experts import ClusterActivations
from cluster.status.fields import Kind, Metric, Sample, samples
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus

_LOAD_RATIO = Metric(
    "moesaic_expert_load_ratio", Kind.GAUGE, "Activations of the layer's busiest expert over the mean; 1 is even."
)
_TOKENS = Metric("moesaic_expert_tokens", Kind.COUNTER, "Tokens whose gate chose the expert.")


def worker_metrics_text(
    workers: Sequence[WorkerStatus],
    hosts: Sequence[ExpertHostStatus] = (),
    cluster: ClusterActivations | None = None,
    *,
    per_expert: bool = False,
) -> str:
    """Prometheus text; names follow vLLM's meanings, expert metrics are ours. Label `process`: the worker or host.

    Args:
        cluster: cluster-wide counts, one series per layer and phase; every front end gives the same, so do not add up.
        per_expert: also one per layer, expert and phase.
    """
    found = [each for worker in workers for each in samples(worker, process=f"worker-{worker.worker_id}")]
    found += [each for host in hosts for each in samples(host, process=host.host_id)]
    if cluster is None:
        return text_of(found)
    always = (_LOAD_RATIO, _TOKENS) if per_expert else (_LOAD_RATIO,)
    return text_of([*found, *_loads(cluster, per_expert=per_expert)], always)


def _loads(cluster: ClusterActivations, *, per_expert: bool) -> Iterator[Sample]:
    """How evenly the gates use the experts, cluster-wide since counting began."""
    for layer in cluster.layers:
        for phase, counts in layer.activations.items():
            labels = {"layer": str(layer.layer), "phase": str(phase)}
            balance = load_balance(counts)
            if balance is not None:
                yield Sample(_LOAD_RATIO, labels, balance)
            for expert, count in enumerate(counts if per_expert else ()):
                yield Sample(_TOKENS, {**labels, "expert": str(expert)}, count)
