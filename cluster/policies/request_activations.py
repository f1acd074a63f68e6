"""MoE-Infinity's signal: which experts a request's tokens chose, matched with past requests.

Source: Xue et al., MoE-Infinity, arXiv 2401.14361: expert activation matrices (EAM), a collection of past ones (EAMC),
PredictEAM. Prefill and decode are kept apart. Where the paper leaves room: a decoding request is matched by all its
decode steps so far, each weighing `memory` times the next one (0: the running step alone, 1: the whole request).

Shapes: C stored matrices, L MoE layers, E experts of a layer, S sequences of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.policies.signals import GateSignal, Grid, Silent, StepSignal


class ActivationCollection:
    """At most `capacity` activation matrices; a new one replaces the stored one most like it (EAMC)."""

    def __init__(self, grid: Grid, capacity: int) -> None:
        self._matrices = np.zeros((capacity, grid.size), dtype=np.float32)
        self._unit = np.zeros((capacity, grid.size), dtype=np.float32)
        self.size = 0

    def insert(self, matrix: np.ndarray) -> None:
        """Args: matrix: [L * E], any scale; one without activations is not stored."""
        norm = float(np.linalg.norm(matrix))
        if norm == 0:
            return
        unit = matrix / norm
        slot = self.size
        if slot == len(self._unit):
            slot = int((self._unit @ unit).argmax())
        else:
            self.size += 1
        self._matrices[slot], self._unit[slot] = matrix, unit

    def nearest(self, observed: np.ndarray) -> np.ndarray | None:
        """Sum [S, L * E] of the stored matrices of largest cosine with each row of `observed` [S, L * E].

        None while nothing is stored. A row without activations is as near to all: it gets the sum of all.
        """
        if not self.size:
            return None
        similarity = observed @ self._unit[: self.size].T
        best = similarity >= similarity.max(axis=1, keepdims=True) - 1e-6
        return best.astype(np.float32) @ self._matrices[: self.size]


@dataclass(slots=True)
class _Request:
    """total: [2, L * E] by phase (prefill, decode), never decayed; recent: [L * E] what is matched.

    before: recent and decodes, before the step under way.
    """

    total: np.ndarray
    recent: np.ndarray
    decodes: bool = False
    before: tuple[np.ndarray, bool] | None = None


class ActivationTracker(Silent):
    """Follows the running requests and predicts from their like.

    It matches only when asked: a policy asks at most once a layer.
    """

    def __init__(self, grid: Grid, *, capacity: int = 120, memory: float = 1.0) -> None:
        self._grid = grid
        self._predicted: np.ndarray | None = np.zeros((grid.num_layers, grid.num_experts), dtype=np.float32)
        self._memory = memory
        self._collections = (ActivationCollection(grid, capacity), ActivationCollection(grid, capacity))
        self._requests: dict[int, _Request] = {}
        self._step: StepSignal | None = None
        self._heard: list[GateSignal] = []  # of the step

    @property
    def num_tracked(self) -> int:
        """Requests that are followed now."""
        return len(self._requests)

    def on_step(self, step: StepSignal) -> None:
        self._step = step
        self._heard.clear()
        for sequence, decodes in zip(step.sequences, step.is_decode.tolist(), strict=True):
            request = self._requests.get(sequence)
            if request is None:
                zeros = np.zeros((2, self._grid.size), dtype=np.float32)
                request = self._requests[sequence] = _Request(zeros, np.zeros(self._grid.size, dtype=np.float32))
            request.before = request.recent.copy(), request.decodes
            if decodes != request.decodes:
                request.recent[:] = 0
                request.decodes = decodes
            request.recent *= self._memory
        self._predicted = None

    def on_gate(self, gate: GateSignal) -> None:
        assert self._step is not None, "a gate outside a step"
        self._heard.append(gate)
        of_row = self._of_row(gate)
        for index, sequence in enumerate(self._step.sequences):
            request = self._requests[sequence]
            request.total[int(request.decodes), of_row] += gate.counts[index]
            request.recent[of_row] += gate.counts[index]
        self._predicted = None

    def on_step_broken(self) -> None:
        assert self._step is not None, "outside a step"
        for index, sequence in enumerate(self._step.sequences):
            request = self._requests.get(sequence)
            if request is None or request.before is None:
                continue
            for gate in self._heard:  # whole numbers: what is taken away again leaves no trace
                request.total[int(request.decodes), self._of_row(gate)] -= gate.counts[index]
            request.recent, request.decodes = request.before
            request.before = None
        self._heard.clear()

    def on_sequence_end(self, sequence: int) -> None:
        request = self._requests.pop(sequence, None)
        if request is not None:
            for collection, total in zip(self._collections, request.total, strict=True):
                collection.insert(total)

    @property
    def predicted(self) -> np.ndarray:
        """[L, E] float32, for the sequences of the step: what the most similar past requests chose; the mean of the
        sequences. Rows sum to 1, to less where some sequence has nothing like it."""
        if self._predicted is None:
            self._predicted = self._match()
        return self._predicted

    def _of_row(self, gate: GateSignal) -> slice:
        return slice(gate.row * self._grid.num_experts, (gate.row + 1) * self._grid.num_experts)

    def _match(self) -> np.ndarray:
        assert self._step is not None
        shape = (self._grid.num_layers, self._grid.num_experts)
        merged = np.zeros(shape, dtype=np.float32)
        for phase in (False, True):
            requests = [self._requests[s] for s in self._step.sequences if self._requests[s].decodes is phase]
            if not requests:
                continue
            nearest = self._collections[phase].nearest(np.stack([r.recent for r in requests]))
            if nearest is None:
                continue
            by_layer = nearest.reshape(len(requests), *shape)
            sums = by_layer.sum(axis=2, keepdims=True)
            merged += np.divide(by_layer, sums, out=np.zeros_like(by_layer), where=sums > 0).sum(axis=0)
        return merged / len(self._step.sequences)
