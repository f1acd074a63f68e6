"""Moesaic's own prefetch: whatever saves more stall than it costs the link, by the estimate of NextUse.

Before the first layer the embedding of the step's token speaks for all layers. After a gate the next layer's gate,
applied to this layer's input (mixtral-offloading's signal), is blended in; how much it is worth is learned per layer.

Price. A load started `lead` seconds before its layer hides min(load, lead) of the stall, if the expert is used (p). If
it is not, the link was held for `load`, which delays a demand load only in so far as the link is busy with those; and
always by half the chunk that a demand load cannot pre-empt. So it is fetched if
p * min(load, lead) > (1 - p) * load * max(busy, half a chunk), and if it is worth more than what it displaces.

Shapes: S sequences of a step, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from actors.experts.linear_head import sigmoid
from actors.experts.next_use import NextUse
from actors.experts.predict.base import BEFORE_FIRST, Forecast
from actors.experts.signals import GateSignal, Grid, Silent, StepSignal

_HALF_CHUNK = 1 / 6
_FLOOR = 0.3  # of a uniform gate probability, as in NextUse
_EDGE = 1e-4
_BLEND_RATE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCosts:
    """Measured, not constants. load_s: one expert over the link. layer_s: compute time of one layer.

    busy: share of the time, 0 to 1, in which demand loads hold the link.
    """

    load_s: float
    layer_s: float
    busy: float


class MoesaicPredictor(Silent):
    """Probability of use, priced."""

    def __init__(self, grid: Grid, next_use: NextUse, costs: Callable[[], LinkCosts]) -> None:
        """Listens to the signals after `next_use`. `costs` is asked at every forecast."""
        self._grid, self._next_use, self._costs = grid, next_use, costs
        self._blend = np.tile(np.array([0.0, 1.0, 0.0], np.float32), (grid.num_layers, 1))
        self._is_decode = np.zeros(0, np.bool_)
        self._ahead: np.ndarray | None = None
        self._blended: tuple[np.ndarray, np.ndarray] | None = None

    def on_step(self, step: StepSignal) -> None:
        self._is_decode = step.is_decode
        self._ahead = self._blended = None

    def on_gate(self, gate: GateSignal) -> None:
        if self._blended is not None:
            self._learn_blend(gate, *self._blended)
        self._ahead, self._blended = gate.ahead, None

    def predict(self, row: int) -> Forecast | None:
        probability = self._next_use.hazards()
        following = row + 1
        if row != BEFORE_FIRST and following < self._grid.num_layers and self._ahead is not None:
            chosen = self._blend_next_gate(following, self._ahead)
            probability[following] = 1 - (1 - chosen).prod(axis=0)
        shape = (self._grid.num_layers, self._grid.num_experts)
        worth = np.maximum(self._next_use.values().reshape(shape), _EDGE)
        priority = np.where(probability > self._threshold(row)[:, None], worth, 0.0)
        return Forecast(priority.astype(np.float32), probability.astype(np.float32))

    def _threshold(self, row: int) -> np.ndarray:
        """[L] the probability from which a fetch pays."""
        costs, num_layers = self._costs(), self._grid.num_layers
        lead_s = ((np.arange(num_layers) - row - 1) % num_layers + 1) * costs.layer_s
        hidden_s = np.minimum(costs.load_s, lead_s)
        held_s = costs.load_s * max(costs.busy, _HALF_CHUNK)
        return held_s / (held_s + hidden_s)

    def _blend_next_gate(self, row: int, ahead: np.ndarray) -> np.ndarray:
        """[S, E] probability of use at `row`, the next one."""
        soon = np.clip(self._next_use.soon()[:, row], _EDGE, 1 - _EDGE)
        gate = np.log(ahead * self._grid.num_experts + _FLOOR)
        features = np.stack([np.ones_like(soon), np.log(soon / (1 - soon)), gate], axis=-1)
        chosen = sigmoid(features @ self._blend[row])
        self._blended = features, chosen
        return chosen

    def _learn_blend(self, gate: GateSignal, features: np.ndarray, chosen: np.ndarray) -> None:
        errors = ((gate.counts > 0) - chosen)[self._is_decode]
        features = features[self._is_decode]
        if errors.size:
            energy = 1 + np.square(features).sum(axis=-1, keepdims=True)
            self._blend[gate.row] += _BLEND_RATE * (features / energy * errors[..., None]).sum(axis=(0, 1))
