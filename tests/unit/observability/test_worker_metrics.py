"""Expert load and expert memories as Prometheus sees them: few series, and one per expert only when asked for."""

from __future__ import annotations

import asyncio

import pytest
from fakes import MEMORY, FakeAttentionWorker

from cluster.observability.worker_metrics import worker_metrics_text
from cluster.status.experts import ClusterActivations, LayerActivations
from cluster.types import Phase

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


def test_the_load_ratio_is_named_before_anything_is_counted() -> None:
    """Who looks for it must find that there is none yet, not that there is no such metric."""
    nothing = ClusterActivations(layers=(), degraded=None)
    assert "# TYPE moesaic_expert_load_ratio gauge" in worker_metrics_text((), (), nothing)


@pytest.fixture
def samples() -> dict[str, float]:
    """What a worker's expert memory gives, without its own label."""
    workers = asyncio.run(FakeAttentionWorker().worker_statuses())
    lines = [line for line in worker_metrics_text(workers).splitlines() if line.startswith("moesaic_expert")]
    assert all('process="worker-w0"' in line for line in lines)
    named = (line.replace('process="worker-w0"', "").replace("{,", "{").replace(",}", "}").split(" ") for line in lines)
    return {name: float(value) for name, value in named}


def test_misses_and_bytes_are_told_by_tier(samples: dict[str, float]) -> None:
    assert samples["moesaic_expert_cache_hits_total{}"] == 7
    misses = {tier: samples[f'moesaic_expert_cache_misses_total{{tier="{tier}"}}'] for tier in MEMORY.misses_by_tier}
    assert misses == MEMORY.misses_by_tier
    assert samples['moesaic_expert_prefetch_bytes_total{tier="disk"}'] == 12
    assert samples['moesaic_expert_moved_bytes_total{tier="ram"}'] == 25
    assert samples['moesaic_expert_resident_bytes{tier="ram"}'] == 10
    assert samples['moesaic_expert_budget_bytes{tier="device"}'] == 10
    assert 'moesaic_expert_budget_bytes{tier="disk"}' not in samples, "it has none"
    assert samples["moesaic_expert_stall_seconds_total{}"] == 0.5


def test_prefetches_are_told_by_outcome(samples: dict[str, float]) -> None:
    outcomes = {"used": 6, "late": 1, "wasted": 8, "dropped": 9}
    for outcome, count in outcomes.items():
        assert samples[f'moesaic_expert_prefetches_total{{outcome="{outcome}"}}'] == count
    assert samples["moesaic_expert_search_ratio{}"] == 0.25
    assert samples['moesaic_expert_policy_info{eviction="moesaic",prediction="fmoe"}'] == 1


def test_calibration_is_told_in_sums_by_range(samples: dict[str, float]) -> None:
    """Two ranges: sums of 16 forecasts of 0.125 and 4 of 0.75, of which a quarter and a half came true."""
    for at_least, count, expected, true in (("0", 16, 2, 4), ("0.5", 4, 3, 2)):
        assert samples[f'moesaic_expert_forecasts_total{{at_least="{at_least}"}}'] == count
        assert samples[f'moesaic_expert_forecasts_expected_total{{at_least="{at_least}"}}'] == expected
        assert samples[f'moesaic_expert_forecasts_true_total{{at_least="{at_least}"}}'] == true
