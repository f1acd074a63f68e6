"""Counts which experts the gates choose, on the attention worker, wherever experts run.

Knows gate choices and the phases of rows; knows nothing of stores. The engine's thread adds, other threads
may read at any time: a value read is at most one step old.

Shapes: T real token rows, K experts per token (top-k), E experts of a layer, 2 phases in the order of `Phase`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from actors.kernels.native import NativeKernels
from cluster.types import Phase


class ActivationRecorder:
    """Activations since start by layer, phase and expert."""

    def __init__(self, layers: Iterable[int], num_experts: int, native: NativeKernels | None) -> None:
        """Args: native: None counts with numpy."""
        self._native = native
        self._tensors = {layer: torch.zeros(len(Phase), num_experts, dtype=torch.int64) for layer in layers}
        self._counts = {layer: counts.numpy() for layer, counts in self._tensors.items()}
        self._pending: list[tuple[int, Tensor, int]] = []

    @property
    def counts(self) -> dict[int, np.ndarray]:
        """(2, E) int64 by layer; the recorder's own arrays, which grow at the end of each step."""
        return self._counts

    def record(self, layer: int, topk_ids_TK: Tensor, num_decode: int) -> None:
        """Add one layer's choices. Args: topk_ids_TK: int64, the first `num_decode` rows decode, the rest prefill."""
        self._pending.append((layer, topk_ids_TK, num_decode))
        if len(self._pending) >= len(self._counts):
            self.settle()

    def settle(self) -> None:
        """Count what was recorded. Once a step, not once a layer: between two layers this code would run cold, five
        times as slow."""
        for layer, topk_ids_TK, num_decode in self._pending:
            self._count(layer, topk_ids_TK.contiguous(), num_decode * topk_ids_TK.size(1))
        self._pending.clear()

    def _count(self, layer: int, ids: Tensor, num_decode: int) -> None:
        if self._native is not None:
            self._native.count_choices(ids, self._tensors[layer], num_decode=num_decode)
            return
        prefill, decode = self._counts[layer]
        flat = ids.numpy().reshape(-1)
        decode += np.bincount(flat[:num_decode], minlength=len(decode))
        prefill += np.bincount(flat[num_decode:], minlength=len(prefill))
