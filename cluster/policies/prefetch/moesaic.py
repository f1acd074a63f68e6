"""Moesaic's own prefetch: whatever saves more stall than it costs the link, by the estimate of NextUse.

Before the first layer the embedding of the step's token speaks for all layers, then every gate for those that follow.

Price. A load started `lead` seconds before its layer hides min(load, lead) of the stall, if the expert is used (p). If
it is not, the link was held for `load`, which delays a demand load only in so far as the link is busy with those; and
always by half the chunk that a demand load cannot pre-empt. Either way it takes processor time, which the computation
may lack. So it is fetched if p * min(load, lead) > (1 - p) * load * max(busy, half a chunk) + processor time. The
nearest layer goes first: of the others more will be known by then.

That holds where a prefetch gives way. Where all parts of an expert are read at once, as from a disk that wants
several reads in flight, it goes before whatever is asked for while it lasts: it hides only what the link would have
idled.

Shapes: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.policies.next_use.estimate import NextUse
from cluster.policies.prefetch.base import BEFORE_FIRST, Forecast
from cluster.policies.signals import Grid

_HALF_CHUNK = 1 / 6
_PER_LAYER = 0.5  # a layer further on is worth this much less


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCosts:
    """Measured, not constants. load_s: one expert over the link. layer_s: compute time of one layer.

    busy: share of the time, 0 to 1, in which demand loads hold the link or steps wait for it. cpu_s: processor time of
    one load. gives_way: whether a prefetch lets a demand go first, chunk by chunk.
    """

    load_s: float
    layer_s: float
    busy: float
    cpu_s: float = 0.0
    gives_way: bool = True

    def pays_from(self, layers_ahead: npt.ArrayLike) -> np.ndarray:
        """The probability of use from which a fetch so many layers ahead pays; 1 and more: it never does.

        >>> LinkCosts(load_s=3e-3, layer_s=1e-3, busy=0.5).pays_from([1, 3]).round(2)
        array([0.6 , 0.33])
        """
        hidden_s = np.minimum(self.load_s, np.multiply(layers_ahead, self.layer_s))
        if not self.gives_way:
            hidden_s *= 1 - self.busy
        held_s = self.load_s * max(self.busy, _HALF_CHUNK)
        return (held_s + self.cpu_s) / (held_s + hidden_s)


class MoesaicPredictor:
    """Probability of use, priced."""

    def __init__(self, grid: Grid, next_use: NextUse, costs: Callable[[], LinkCosts]) -> None:
        """`next_use` hears the signals. `costs` is asked at every step."""
        self._next_use, self._costs = next_use, costs
        row, layer = np.arange(-1, grid.num_layers)[:, None], np.arange(grid.num_layers)
        # [1 + L, L, 1] from the row asked at to the others: layers until one computes, 1 for the next one
        self._layers_ahead = ((layer - row - 1) % grid.num_layers + 1).astype(np.float32)[..., None]
        self._nearness = _PER_LAYER ** (self._layers_ahead - 1)
        self._threshold = self._costs().pays_from(self._layers_ahead)
        self._may_pay = True

    def predict(self, row: int) -> Forecast | None:
        if row == BEFORE_FIRST:
            self._threshold = self._costs().pays_from(self._layers_ahead)
            self._may_pay = bool(self._threshold.min() < 1)
        if not self._may_pay:
            return None
        probability = self._next_use.hazards().copy()
        priority = probability * self._nearness[row + 1] * (probability > self._threshold[row + 1])
        return Forecast(priority, probability)
