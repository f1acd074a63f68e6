"""Turns a gate trace into the steps that a server with so many running sequences would compute.

Which sequences share a step depends on their lengths alone, so every policy replays the same steps and the future is
known to who may know it.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, K experts per token (top-k).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.policies.signals import GateSignal, Grid, SignalListener, StepSignal
from cluster.policies.trace import GateTrace, RequestRows


@dataclass(frozen=True, slots=True)
class ReplayStep:
    """One step. needed: by row of the grid, the distinct experts, ascending; rows: tokens that each of them has.

    gates: by row. num_tokens: sequences that decode in it. ended: sequences over after it.
    """

    signal: StepSignal
    gates: tuple[GateSignal, ...]
    needed: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    num_tokens: int
    ended: tuple[int, ...]

    @property
    def is_decode(self) -> bool:
        """Whether no prompt is taken in."""
        return self.num_tokens == len(self.signal.sequences)

    @property
    def decodes(self) -> list[bool]:
        """Of each sequence, whether it decodes."""
        return self.signal.is_decode.tolist()

    def begin(self, listeners: Sequence[SignalListener]) -> None:
        """Tell that the step begins."""
        for listener in listeners:
            listener.on_step(self.signal)

    def pass_gate(self, listeners: Sequence[SignalListener], row: int) -> None:
        """Tell what a gate said."""
        for listener in listeners:
            listener.on_gate(self.gates[row])

    def end(self, listeners: Sequence[SignalListener]) -> None:
        """Tell that the step is over, and which sequences are."""
        for listener in listeners:
            listener.on_step_end()
        for sequence in self.ended:
            for listener in listeners:
                listener.on_sequence_end(sequence)


@dataclass(frozen=True, slots=True)
class StepPart:
    """What one sequence brings to a step: [L, E] means and counts, as in GateSignal, [L - 1, E] ahead, [D] vector."""

    probs: np.ndarray
    counts: np.ndarray
    ahead: np.ndarray
    vector: np.ndarray
    num_rows: int
    is_decode: bool


def grid_of(trace: GateTrace) -> Grid:
    """The experts of the traced model."""
    return Grid(trace.model.layers, trace.model.num_experts, trace.model.top_k)


def build_steps(trace: GateTrace, *, concurrency: int, order: Sequence[int]) -> list[ReplayStep]:
    """Steps of a closed loop: as soon as a sequence ends the next one of `order` (request indices) joins."""
    waiting = iter(order)
    running: dict[int, Iterator[tuple[slice, bool]]] = {}
    rows: dict[int, RequestRows] = {}
    steps: list[ReplayStep] = []
    while True:
        while len(running) < concurrency and (index := next(waiting, None)) is not None:
            rows[index] = trace.rows_of(index)
            running[index] = _with_end(list(rows[index].step_slices()))
        parts = {index: part for index, it in list(running.items()) if (part := next(it, None)) is not None}
        ended = tuple(index for index in running if index not in parts or parts[index][1])
        if parts:
            grid = grid_of(trace)
            steps.append(
                merge_parts([(i, part_of(rows[i], part, grid)) for i, (part, _) in parts.items()], grid, ended)
            )
        for index in ended:
            del running[index], rows[index]
        if not running and not parts:
            return steps


def mixed_order(num_requests: int, seed: int = 0) -> list[int]:
    """Request indices in a random order, so that domains alternate as they would on a server."""
    return [int(i) for i in np.random.default_rng(seed).permutation(num_requests)]


def _with_end(slices: list[slice]) -> Iterator[tuple[slice, bool]]:
    for number, part in enumerate(slices, 1):
        yield part, number == len(slices)


def part_of(rows: RequestRows, part: slice, grid: Grid) -> StepPart:
    """What the gates said of the rows of one forward step of a request."""
    counts = np.zeros((grid.num_layers, grid.num_experts), dtype=np.float32)
    layer_index = np.arange(grid.num_layers)[:, None]
    for chosen in rows.chosen[part]:  # distinct within a token, so plain indexing counts right
        counts[layer_index, chosen] += 1
    return StepPart(
        rows.probs[part].mean(axis=0, dtype=np.float32),
        counts,
        rows.ahead[part].mean(axis=0, dtype=np.float32),
        rows.vectors[part].mean(axis=0, dtype=np.float32),
        part.stop - part.start,
        bool(rows.is_decode[part].all()),
    )


def merge_parts(parts: Sequence[tuple[int, StepPart]], grid: Grid, ended: tuple[int, ...]) -> ReplayStep:
    """The step that these sequences, given with their numbers, compute together."""
    probs, counts, ahead = (
        np.stack([getattr(part, name) for _, part in parts]) for name in ("probs", "counts", "ahead")
    )
    is_decode = np.array([part.is_decode for _, part in parts])
    signal = StepSignal(
        tuple(number for number, _ in parts),
        np.stack([part.vector for _, part in parts]),
        np.array([part.num_rows for _, part in parts]),
        is_decode,
    )
    last = grid.num_layers - 1
    gates = tuple(
        GateSignal(row, probs[:, row], counts[:, row], ahead[:, row] if row < last else None)
        for row in range(grid.num_layers)
    )
    tokens = counts.sum(axis=0)
    needed = [np.flatnonzero(of_layer) for of_layer in tokens]
    return ReplayStep(
        signal,
        gates,
        tuple(tuple(of_layer.tolist()) for of_layer in needed),
        tuple(tuple(tokens[row][of_layer].astype(np.int64).tolist()) for row, of_layer in enumerate(needed)),
        int(is_decode.sum()),
        ended,
    )
