"""fMoE's search: the stored maps most like what is being computed, and what they say of the layers to come.

Pure; whoever drives it decides on which thread. Each sequence is matched by itself; nothing of it outlives its step.

Source: Yu et al., FineMoE (fMoE), EuroSys 2026, arXiv 2502.05370. Layers 1..d are planned from the embeddings before
the step, layer l + d from the gates of layers 1..l.

Shapes: S sequences of a step, C stored entries, L MoE layers, E experts of a layer, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.policies.expert_maps.store import MapStore, TrajectoryMatch
from cluster.policies.signals import GateSignal, Silent, StepSignal


@dataclass(slots=True)
class _Step:
    """embeddings [S, D], trajectory [S, L, E] as observed, match None while the store is empty.

    semantic: [S, C] cosines of embeddings. redundancy: [S, C] once all layers were observed.
    """

    embeddings: np.ndarray
    trajectory: np.ndarray
    match: TrajectoryMatch | None
    semantic: np.ndarray | None = None
    redundancy: np.ndarray | None = None


class MapSearch(Silent):
    """Follows steps; keeps what was planned for the present one.

    plan: [S, L, E] float32, probability of the experts selected for prefetch, 0 of the others.
    searched: [L, E] float32, probability last searched for, summed over the step's sequences, selected or not.
    """

    def __init__(self, store: MapStore, *, learn: bool = True) -> None:
        """Args: learn: insert the maps of every step."""
        grid = store.grid
        self.plan = np.zeros((0, grid.num_layers, grid.num_experts), dtype=np.float32)
        self.searched = np.zeros((grid.num_layers, grid.num_experts), dtype=np.float32)
        self.store = store
        self._learn = learn
        self._step: _Step | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing of any request is kept."""
        return self._step is None

    def on_step(self, step: StepSignal) -> None:
        store, num_sequences = self.store, len(step.sequences)
        shape = (num_sequences, store.grid.num_layers, store.grid.num_experts)
        self.plan = np.zeros(shape, dtype=np.float32)
        match = store.begin_match(num_sequences) if store.size else None
        self._step = _Step(step.embeddings, np.zeros(shape, dtype=np.float32), match)
        if match is not None:
            cosine = self._step.semantic = store.match_embeddings(step.embeddings)
            for row in range(min(store.distance, store.grid.num_layers)):
                self._plan_row(row, cosine)

    def on_gate(self, gate: GateSignal) -> None:
        assert self._step is not None, "a gate outside a step"
        self._step.trajectory[:, gate.row] = gate.probs
        if self._step.match is None:
            return
        cosine = self.store.observe(self._step.match, gate.probs)
        target = gate.row + self.store.distance
        if target < self.store.grid.num_layers:
            self._plan_row(target, cosine)
        if gate.row == self.store.grid.num_layers - 1 and self._step.semantic is not None:
            self._step.redundancy = self.store.redundancy(self._step.semantic, cosine)

    def on_step_end(self) -> None:
        if self._step is not None and self._learn:
            self.store.insert(self._step.embeddings, self._step.trajectory, self._step.redundancy)
        self.on_step_broken()

    def on_step_broken(self) -> None:
        self._step = None
        self.plan = self.plan[:0]

    def _plan_row(self, row: int, cosine: np.ndarray) -> None:
        """Args: cosine: [S, C]."""
        best = cosine.argmax(axis=1)
        probs = self.store.rows(best, row)
        scores = cosine[np.arange(len(best)), best]
        self.plan[:, row] = np.where(select_experts(probs, scores, self.store.grid.top_k), probs, 0)
        self.searched[row] = probs.sum(axis=0)


def select_experts(probs: np.ndarray, scores: np.ndarray, top_k: int) -> np.ndarray:
    """fMoE's delta rule: [S, E] bool, the shortest prefix of the likeliest experts with sum >= delta and at least K.

    delta = clip(1 - score, 0, 1): a good match fetches K experts, a poor one more.

    Args: probs: [S, E]. scores: [S] cosines.
    """
    selected = np.zeros(probs.shape, dtype=bool)
    for i, order in enumerate(np.argsort(-probs, axis=1, kind="stable")):
        delta = min(max(1 - float(scores[i]), 0.0), 1.0)
        sums = probs[i, order].cumsum(dtype=np.float64)
        selected[i, order[: max(int(sums.searchsorted(delta)) + 1, top_k)]] = True
    return selected
