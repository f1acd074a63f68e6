"""Sums in which an activation counts half after each half-life. Knows numbers and times; knows no storage."""

from __future__ import annotations

from dataclasses import replace

from cluster.semantics.statistics import ExpertStatistics

NUM_VERSIONS = 2
"""Versions of clusters whose statistics are kept: workers and the scheduler change over a few seconds apart."""


class DecayedTotals:
    """Decayed sums by version of clusters; version v replaces v - NUM_VERSIONS, and what is older is not taken."""

    def __init__(self) -> None:
        self._totals: dict[int, tuple[float, ExpertStatistics]] = {}  # by version % NUM_VERSIONS; since when decayed

    def add(self, delta: ExpertStatistics, *, half_life_s: float, now_s: float) -> None:
        """Add counts made just now.

        Raises:
            ValueError: not finite; another number of clusters, layers or experts than the same version had before.
        """
        delta.check_finite()
        slot = delta.clusters_version % NUM_VERSIONS
        at_s, total = self._totals.get(slot, (now_s, None))
        if total is None or total.clusters_version < delta.clusters_version:
            self._totals[slot] = (now_s, delta.copy())
        elif total.clusters_version == delta.clusters_version:
            if total.values.shape != delta.values.shape:
                raise ValueError(f"statistics of shape {delta.values.shape}; this version has {total.values.shape}")
            total.values[:] *= 0.5 ** (max(now_s - at_s, 0.0) / half_life_s)
            total.values[:] += delta.values
            self._totals[slot] = (now_s, total)

    def read(self, clusters_version: int, *, half_life_s: float, now_s: float) -> ExpertStatistics | None:
        """The sums of a version now; None if there is nothing of it."""
        at_s, total = self._totals.get(clusters_version % NUM_VERSIONS, (now_s, None))
        if total is None or total.clusters_version != clusters_version:
            return None
        return replace(total, values=total.values * 0.5 ** (max(now_s - at_s, 0.0) / half_life_s))

    def read_all(self, *, half_life_s: float, now_s: float) -> list[ExpertStatistics]:
        """The sums of every version that is kept."""
        versions = [total.clusters_version for _, total in self._totals.values()]
        found = [self.read(version, half_life_s=half_life_s, now_s=now_s) for version in versions]
        return [statistics for statistics in found if statistics is not None]
