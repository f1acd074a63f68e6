"""What one process says of its expert memory: tiers, where experts were found, what was fetched ahead of need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from cluster.status.fields import Row, Unit, counter, fact, gauge, info, label
from cluster.types import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatus:
    """One tier of an expert memory. Counts are since start."""

    tier: Annotated[Tier, label("tier", "Which.")]
    budget_bytes: Annotated[
        int | None, gauge("moesaic_expert_budget_bytes", "Bytes that the tier may hold.", Unit.BYTES)
    ]
    resident_bytes: Annotated[int, gauge("moesaic_expert_resident_bytes", "Bytes of experts in the tier.", Unit.BYTES)]
    num_resident: Annotated[int, fact("Experts in the tier.")]
    bytes_moved: Annotated[
        int,
        counter("moesaic_expert_moved_bytes", "Bytes of experts moved out of the tier into faster ones.", Unit.BYTES),
    ]
    emulated: Annotated[bool, fact("Whether its link has a declared rate.")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """Forecasts of one range of probability."""

    predicted: Annotated[float, fact("Mean of the forecasts.", Unit.SHARE)]
    observed: Annotated[float, fact("Share of them that came true.", Unit.SHARE)]
    count: Annotated[int, fact("How many there were.")]


_prefetches = partial(
    counter,
    "moesaic_expert_prefetches",
    family="Experts fetched ahead, by outcome; late: asked for while on their way, so also a miss.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMemoryStatus:
    """One process's expert memory, in bytes and counts since start. Budget and resident: the fast tier's.

    `calibration`: bin i of n has forecasts from i / n to (i + 1) / n; empty without any. The properties are its sums,
    so that rates over any window give its curve: expected and true over all, by range of probability.
    """

    eviction: Annotated[
        str, info("moesaic_expert_policy", "Which expert leaves a full memory first, a policy.", "Names in use.")
    ]
    prediction: Annotated[
        str, info("moesaic_expert_policy", "What is fetched ahead of need, a policy.", "Names in use.")
    ]
    tiers: tuple[TierStatus, ...]
    budget_bytes: Annotated[int, fact("Bytes that the fast tier may hold.", Unit.BYTES)]
    resident_bytes: Annotated[int, fact("Bytes of experts in the fast tier.", Unit.BYTES)]
    model_expert_bytes: Annotated[int, fact("Bytes of all experts of the model, as held in memory.", Unit.BYTES)]
    num_experts: Annotated[int, fact("Experts of the model, over all layers.")]
    num_resident: Annotated[int, fact("Experts in the fast tier.")]
    hits: Annotated[int, counter("moesaic_expert_cache_hits", "Experts found resident in the fast tier.")]
    misses: Annotated[int, fact("Experts asked for that were not.")]
    misses_by_tier: Annotated[
        Mapping[Tier, int],
        counter(
            "moesaic_expert_cache_misses",
            "Experts asked for that were not, by the tier that they came from.",
            key="tier",
        ),
    ]
    late: Annotated[int, _prefetches(text="Of the misses, those on their way by prefetch.", outcome="late")]
    prefetch_used: Annotated[int, _prefetches(text="Experts fetched ahead, then used.", outcome="used")]
    prefetch_wasted: Annotated[int, _prefetches(text="Experts fetched ahead, evicted unused.", outcome="wasted")]
    prefetch_dropped: Annotated[int, _prefetches(text="Fetches ahead given up half-way.", outcome="dropped")]
    prefetch_bytes: Annotated[
        Mapping[Tier, int],
        counter("moesaic_expert_prefetch_bytes", "Of the bytes moved, those ahead of need.", Unit.BYTES, key="tier"),
    ]
    bytes_read: Annotated[int, counter("moesaic_expert_read_bytes", "Bytes of experts read from disk.", Unit.BYTES)]
    stall_s: Annotated[
        float, counter("moesaic_expert_stall_seconds", "Time that steps waited for experts.", Unit.SECONDS)
    ]
    search_share: Annotated[
        float,
        gauge("moesaic_expert_search_ratio", "Time of the thread that predicts over that of steps.", Unit.SHARE),
    ]
    calibration: tuple[CalibrationBin, ...]
    read_mode: Annotated[str, fact("How the checkpoint is read: O_DIRECT or buffered.")]
    kernel: Annotated[str, fact("What computes experts.")]
    view_bytes: Annotated[int, fact("What finding experts takes, beside the budget.", Unit.BYTES)] = 0

    @property
    def forecasts(
        self,
    ) -> Annotated[
        Mapping[str, float],
        counter(
            "moesaic_expert_forecasts",
            "Forecasts of an expert's use, by probability from at_least on.",
            key="at_least",
        ),
    ]:
        """By the least probability of a range."""
        return self._sums(lambda each: each.count)

    @property
    def forecasts_expected(
        self,
    ) -> Annotated[
        Mapping[str, float],
        counter("moesaic_expert_forecasts_expected", "Sum of their probabilities.", key="at_least"),
    ]:
        """As `forecasts`."""
        return self._sums(lambda each: each.predicted * each.count)

    @property
    def forecasts_true(
        self,
    ) -> Annotated[
        Mapping[str, float], counter("moesaic_expert_forecasts_true", "Those that came true.", key="at_least")
    ]:
        """As `forecasts`."""
        return self._sums(lambda each: each.observed * each.count)

    def _sums(self, of: Callable[[CalibrationBin], float]) -> Mapping[str, float]:
        bins = self.calibration
        return {f"{i / len(bins):g}": of(each) for i, each in enumerate(bins)}


MEMORY_ROWS: tuple[Row, ...] = (
    (
        "expert memory",
        "{resident_bytes} of {budget_bytes} ({num_resident} of {num_experts} experts, {model_expert_bytes})",
    ),
    ("eviction / prediction", "{eviction} / {prediction}"),
    ("hits / misses", "{hits} / {misses}"),
)
TRAFFIC_ROWS: tuple[Row, ...] = (
    (
        "prefetch",
        "{prefetch_used} used, {late} late, {prefetch_wasted} wasted, {prefetch_dropped} dropped; {prefetch_bytes}; "
        "search {search_share} of step time",
    ),
    ("reads", "{bytes_read}, {read_mode}, stalled {stall_s}"),
    ("kernel", "{kernel}"),
)
"""What the command line shows of it: before the lines of its tiers, and after them."""
