"""Dispatch tokens to experts and combine what comes back; here: all experts in this process.

Knows rows and gate choices; knows nothing of sequences. `start` gives the work away and returns what fetches the
result, so that a driver with several micro-batches can do something else meanwhile.

Shapes: T token rows, D model dim, K experts per token (top-k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from actors.experts.backend import ExpertBackend
from actors.experts.policy_runner import PolicyRunner
from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork


class Dispatcher(Protocol):
    """Runs the experts of a step's layers, wherever they are."""

    recorder: ActivationRecorder

    def start(self, work: ExpertWork, num_rows: int, num_decode: int) -> Callable[[], Tensor]:
        """Begin one layer; calling the result waits for its routed output [T, D] in hidden_TD's dtype.

        Args:
            num_rows: rows from here on are padding; their output is zero.
            num_decode: the first rows decode, the other real ones are prefill: that is what is recorded.
        """
        ...

    def close(self) -> None:
        """Give up what it holds."""
        ...


class LocalDispatcher:
    """Runs every expert from this process's expert memory; the base and the specification."""

    def __init__(
        self, backend: ExpertBackend, recorder: ActivationRecorder, policy_runner: PolicyRunner | None = None
    ) -> None:
        self.recorder = recorder
        self._backend = backend
        self._policy_runner = policy_runner

    def start(self, work: ExpertWork, num_rows: int, num_decode: int) -> Callable[[], Tensor]:
        """Compute at once; see Dispatcher."""
        ids_TK = work.topk_ids_TK[:num_rows]
        self.recorder.record(work, num_rows, num_decode)
        hidden, weights_TK = work.hidden_TD, work.topk_weights_TK[:num_rows]
        out = self._backend.partial_sums(work.layer, hidden[:num_rows], ids_TK, weights_TK, hidden.dtype)
        return lambda: padded(out, len(hidden))

    def close(self) -> None:
        """Stop reading and give the memory back."""
        if self._policy_runner is not None:
            self._policy_runner.close()
        self._backend.store.close()


def padded(out_RD: Tensor, num_rows: int) -> Tensor:
    """`out_RD` with zero rows up to `num_rows`."""
    if len(out_RD) == num_rows:
        return out_RD
    result = torch.zeros((num_rows, out_RD.shape[1]), dtype=out_RD.dtype)
    result[: len(out_RD)] = out_RD
    return result
