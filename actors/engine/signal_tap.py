"""Hands what the gates of a model say to the policy runner, step by step, while it matters.

Knows the packing of a step and transformers' gate modules; everything but keeping references to tensors happens on the
policy_runner's thread. Padding rows never enter. While all experts are resident nothing is handed over.

Shapes: T packed rows, S sequences, D model dim, E experts of a layer, K experts per token (top-k).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from actors.engine.batcher import ScheduledRows
from actors.engine.step import StepInputs, packed_order
from actors.experts.policy_runner import LayerTimes, PolicyRunner
from actors.gates.reader import gate_readers, means
from actors.gates.work import ExpertWork
from actors.kernels.search import load_search
from cluster.policies.signals import GateSignal, StepSignal
from cluster.types import RequestId


class SignalTap:
    """Between one model and one policy runner; the engine's thread calls it."""

    def __init__(self, model: nn.Module, policy_runner: PolicyRunner) -> None:
        """Raises: CheckpointError: an experts module without a gate beside it."""
        self.policy_runner = policy_runner
        self._readers = gate_readers(model, load_search())
        self._embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        self._logits: dict[int, Tensor] = {}
        self._numbers: dict[RequestId, int] = {}
        self._next_number = 0
        self._starts: np.ndarray | None = None  # of each sequence's rows; None while nothing is handed over
        self._heard: list[tuple[ExpertWork, Tensor]] = []
        self._num_rows = 0
        self._stride = 1
        self._began_s = self._last_s = self._stall_s = self._demand_s = 0.0
        for layer, reader in self._readers.items():
            reader.gate.register_forward_hook(partial(self._on_gate, layer))

    def begin(self, rows: Seq[ScheduledRows], step: StepInputs) -> None:
        """A step is about to run."""
        store = self.policy_runner.store
        self._starts = None
        self._stride = self.policy_runner.stride
        if store.holds_everything:
            return
        if self.policy_runner.is_behind:  # the step is left out
            return
        ordered = packed_order(rows)
        lengths = np.array([item.num_rows for item in ordered])
        self._starts = np.cumsum(lengths) - lengths
        sequences = tuple(self._number(item.sequence.request.request_id) for item in ordered)
        is_decode = np.array([item.decodes for item in ordered])
        token_ids = step.token_ids[0, : step.num_rows]
        self._began_s = self._last_s = time.perf_counter()
        self._stall_s, self._demand_s = store.counters.total_stall_s, store.demand_s()
        starts = self._starts
        self.policy_runner.begin_step(
            lambda: StepSignal(
                sequences, means(self._embeddings[token_ids].float().numpy(), starts), lengths, is_decode
            )
        )

    def gate(self, work: ExpertWork, num_rows: int) -> None:
        """A layer's experts are about to run. Several layers are handed over together while that loses little."""
        logits = self._logits.pop(work.layer, None)
        if self._starts is None or logits is None:
            return
        self._num_rows = num_rows
        self._heard.append((work, logits))
        if len(self._heard) >= self._stride:
            self._hand_over()

    def end(self, *, is_whole: bool = True) -> None:
        """The step is over. Args: is_whole: not broken off; of one that was nobody is to learn."""
        if self._starts is not None:
            if is_whole:
                self._hand_over()
            self._starts = None
            self.policy_runner.end_step(time.perf_counter() - self._began_s, is_whole=is_whole)
        self._heard.clear()
        self._logits.clear()

    def forget(self, request_id: RequestId) -> None:
        """A request is over."""
        number = self._numbers.pop(request_id, None)
        if number is not None:
            self.policy_runner.end_sequence(number)

    def _on_gate(self, layer: int, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
        if self._starts is not None:
            self._logits[layer] = output[0]

    def _number(self, request_id: RequestId) -> int:
        known = self._numbers.get(request_id)
        if known is None:
            known = self._numbers[request_id] = self._next_number
            self._next_number += 1
        return known

    def _hand_over(self) -> None:
        heard, self._heard = self._heard, []
        if not heard or self._starts is None:
            return
        store, num_layers = self.policy_runner.store, len(heard)
        now_s, stall_s, demand_s = time.perf_counter(), store.counters.total_stall_s, store.demand_s()
        took_s, stalled_s, held_s = now_s - self._last_s, stall_s - self._stall_s, demand_s - self._demand_s
        self._last_s, self._stall_s, self._demand_s = now_s, stall_s, demand_s
        self.policy_runner.post_gates(
            partial(self._signals, heard, self._num_rows, self._starts),
            LayerTimes(
                compute_s=max(took_s - stalled_s, 0.0) / num_layers,
                demand_s=held_s / num_layers,
                took_s=took_s / num_layers,
            ),
        )

    def _signals(self, heard: list[tuple[ExpertWork, Tensor]], num_rows: int, starts: np.ndarray) -> list[GateSignal]:
        return [
            self._readers[work.layer].signal(logits, work.topk_ids_TK, work.hidden_TD, starts, num_rows)
            for work, logits in heard
        ]
