"""Expert load as Prometheus sees it: few series, and one per expert only when asked for."""

from __future__ import annotations

from cluster.observability.worker_metrics import worker_metrics_text
from cluster.types import ClusterActivations, LayerActivations, Phase

CLUSTER = ClusterActivations(
    layers=(
        LayerActivations(layer=0, activations={Phase.PREFILL: (6, 0, 0), Phase.DECODE: (0, 0, 0)}),
        LayerActivations(layer=4, activations={Phase.PREFILL: (1, 1, 1), Phase.DECODE: (1, 2, 3)}),
    ),
    degraded=None,
)


def _samples(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("moesaic_expert")}


def test_load_ratio_per_layer_and_phase() -> None:
    assert _samples(worker_metrics_text((), (), CLUSTER)) == {
        'moesaic_expert_load_ratio{layer="0",phase="prefill"} 3.0',
        'moesaic_expert_load_ratio{layer="4",phase="prefill"} 1.0',
        'moesaic_expert_load_ratio{layer="4",phase="decode"} 1.5',
    }


def test_series_per_expert_when_asked_for() -> None:
    samples = _samples(worker_metrics_text((), (), CLUSTER, per_expert=True))

    assert 'moesaic_expert_tokens_total{expert="2",layer="4",phase="decode"} 3.0' in samples
    assert len(samples) == 3 + 2 * 2 * 3


def test_no_series_without_counts() -> None:
    assert _samples(worker_metrics_text((), ())) == set()
