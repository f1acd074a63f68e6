"""Metrics of expert memories: tiers, prefetch, how forecasts come true. Knows names and meanings only."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import Metric

from cluster.types import CalibrationBin, ExpertMemoryStatus, TierStatus


class MetricFamilies:
    """Samples by name; the label `process` is the worker's or the host's id."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}

    def gauge(self, name: str, text: str, process: str, value: float, **labels: str) -> None:
        """What is so now."""
        self._family(name, text, "gauge").add_sample(name, {"process": process, **labels}, value)

    def count(self, name: str, text: str, process: str, value: float, **labels: str) -> None:
        """What happened since start; exposed with `_total`."""
        self._family(name, text, "counter").add_sample(f"{name}_total", {"process": process, **labels}, value)

    def info(self, name: str, text: str, process: str, **facts: str) -> None:
        """Facts in words; exposed with `_info`."""
        self._family(name, text, "info").add_sample(f"{name}_info", {"process": process, **facts}, 1)

    def all(self) -> list[Metric]:
        """Every family once."""
        return [*self._families.values()]

    def _family(self, name: str, text: str, kind: str) -> Metric:
        return self._families.setdefault(name, Metric(name, text, kind))


def add_memory(families: MetricFamilies, process: str, m: ExpertMemoryStatus | None) -> None:
    """An expert memory, if the process has one."""
    if m is None:
        return
    families.info("moesaic_expert_policy", "Names in use.", process, eviction=m.eviction, prediction=m.prediction)
    families.count("moesaic_expert_cache_hits", "Experts found resident in the fast tier.", process, m.hits)
    misses = "Experts asked for that were not, by the tier that they came from."
    for tier, count in m.misses_by_tier.items():
        families.count("moesaic_expert_cache_misses", misses, process, count, tier=tier)
    outcomes = {"used": m.prefetch_used, "late": m.late, "wasted": m.prefetch_wasted, "dropped": m.prefetch_dropped}
    prefetches = "Experts fetched ahead, by outcome; late: asked for while on their way, so also a miss."
    for outcome, count in outcomes.items():
        families.count("moesaic_expert_prefetches", prefetches, process, count, outcome=outcome)
    ahead = "Of the bytes moved, those ahead of need."
    for tier, num_bytes in m.prefetch_bytes.items():
        families.count("moesaic_expert_prefetch_bytes", ahead, process, num_bytes, tier=tier)
    families.count("moesaic_expert_read_bytes", "Bytes of experts read from disk.", process, m.bytes_read)
    families.count("moesaic_expert_stall_seconds", "Time that steps waited for experts.", process, m.stall_s)
    search = "Time of the thread that predicts over that of steps."
    families.gauge("moesaic_expert_search_ratio", search, process, m.search_share)
    _add_tiers(families, process, m.tiers)
    _add_calibration(families, process, m.calibration)


def _add_tiers(families: MetricFamilies, process: str, tiers: Sequence[TierStatus]) -> None:
    resident, moved = "Bytes of experts in the tier.", "Bytes of experts moved out of the tier into faster ones."
    for t in tiers:
        families.gauge("moesaic_expert_resident_bytes", resident, process, t.resident_bytes, tier=t.tier)
        families.count("moesaic_expert_moved_bytes", moved, process, t.bytes_moved, tier=t.tier)
        if t.budget_bytes is not None:
            families.gauge(
                "moesaic_expert_budget_bytes", "Bytes that the tier may hold.", process, t.budget_bytes, tier=t.tier
            )


def _add_calibration(families: MetricFamilies, process: str, bins: Sequence[CalibrationBin]) -> None:
    """Sums, so that rates over any window give its curve: expected and true over all, by range of probability."""
    for i, b in enumerate(bins):
        at_least = f"{i / len(bins):g}"
        for name, text, value in (
            ("moesaic_expert_forecasts", "Forecasts of an expert's use, by probability from at_least on.", b.count),
            ("moesaic_expert_forecasts_expected", "Sum of their probabilities.", b.predicted * b.count),
            ("moesaic_expert_forecasts_true", "Those that came true.", b.observed * b.count),
        ):
            families.count(name, text, process, value, at_least=at_least)
