"""What an expert memory counts: where experts were found, what was fetched ahead, what it cost.

The store's lock guards all of it; readers of other threads may see a value one step old.

Shapes: L MoE layers in the order of the grid, B bins of predicted probability.
"""

from __future__ import annotations

import numpy as np

from cluster.types import Tier

CALIBRATION_BINS = 10


class MemoryCounters:
    """Since start. Experts are counted once per layer and step that asks for them.

    hits: [L] resident in DEVICE when asked for. misses: [L] by the tier they had to come from (RAM, REMOTE, DISK).
    late: [L] of the misses, those that were already on their way by prefetch.
    prefetch_used, prefetch_wasted: [L] fetched ahead, complete in DEVICE, then used, or evicted unused.
    prefetch_dropped: [L] given up before they were complete. stall_s: [L] seconds in which a step waited for loads;
    total_stall_s: of all layers.
    bytes_moved: by the tier they came from; prefetch_bytes: of these, ahead of need.
    predicted, came_true: [B] forecasts of an expert's use at the next pass of its layer, by their probability
    (bin b: b / B to (b + 1) / B): sum of probabilities, and how many came true; num_forecasts: how many there were.
    """

    def __init__(self, num_layers: int) -> None:
        self.hits = np.zeros(num_layers, dtype=np.int64)
        self.misses: dict[Tier, np.ndarray] = {
            tier: np.zeros(num_layers, dtype=np.int64) for tier in (Tier.RAM, Tier.REMOTE, Tier.DISK)
        }
        self.late = np.zeros(num_layers, dtype=np.int64)
        self.prefetch_used = np.zeros(num_layers, dtype=np.int64)
        self.prefetch_wasted = np.zeros(num_layers, dtype=np.int64)
        self.prefetch_dropped = np.zeros(num_layers, dtype=np.int64)
        self.stall_s = np.zeros(num_layers)
        self.total_stall_s = 0.0
        self.bytes_moved: dict[Tier, int] = dict.fromkeys((Tier.RAM, Tier.REMOTE, Tier.DISK), 0)
        self.prefetch_bytes: dict[Tier, int] = dict.fromkeys((Tier.RAM, Tier.REMOTE, Tier.DISK), 0)
        self.num_forecasts = np.zeros(CALIBRATION_BINS, dtype=np.int64)
        self.predicted = np.zeros(CALIBRATION_BINS)
        self.came_true = np.zeros(CALIBRATION_BINS, dtype=np.int64)

    @property
    def num_hits(self) -> int:
        """All experts that were resident when asked for."""
        return int(self.hits.sum())

    @property
    def num_misses(self) -> int:
        """All experts that were not resident when asked for."""
        return int(sum(values.sum() for values in self.misses.values()))
