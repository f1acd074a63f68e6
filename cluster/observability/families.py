"""Samples of statuses as Prometheus has them. What there is, and its meaning, is declared in cluster/status."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from cluster.status.fields import Kind, Metric, Sample

_SUFFIXES = {Kind.GAUGE: "", Kind.COUNTER: "_total", Kind.INFO: "_info"}


def families(samples: Iterable[Sample], always: Iterable[Metric] = ()) -> list[Family]:
    """Every metric once, with its samples. Args: always: named also while they have none."""
    found = {metric: _family(metric) for metric in always}
    for each in samples:
        metric = each.metric
        if metric not in found:
            found[metric] = _family(metric)
        found[metric].add_sample(f"{metric.name}{_SUFFIXES[metric.kind]}", {**each.labels}, each.value)
    return [*found.values()]


def text_of(samples: Iterable[Sample], always: Iterable[Metric] = ()) -> str:
    """In Prometheus' text format. Args: as of `families`."""
    registry = CollectorRegistry()
    registry.register(_Collected(families(samples, always)))
    return generate_latest(registry).decode()


def _family(metric: Metric) -> Family:
    return Family(metric.name, metric.help, metric.kind)


class _Collected(Collector):
    def __init__(self, found: list[Family]) -> None:
        self._found = found

    def collect(self) -> list[Family]:
        return self._found
