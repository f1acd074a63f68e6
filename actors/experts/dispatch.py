"""Dispatch tokens to experts and combine what comes back; here: all experts in this process.

Knows rows, gate choices and kernels; knows nothing of sequences. Every pair (row, gate rank) has
its own output row, and rows are summed in gate order in float32 whatever the order of execution,
so that cache state, batch and (later) hosts cannot change a result.

Shapes: T token rows, D model dim, K experts per token (top-k), P = T * K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.experts.compute import ExpertCompute
from actors.experts.store import ExpertStore


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """What one MoE layer asks for: rows, the gate's choice and its weights."""

    layer: int
    hidden_TD: Tensor
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor


class LocalDispatcher:
    """Runs every expert from this process's expert memory; the base and the specification."""

    def __init__(self, store: ExpertStore, compute: ExpertCompute) -> None:
        self._store = store
        self._compute = compute
        num = store.layout.num_experts
        self._activations = {layer: np.zeros(num, dtype=np.int64) for layer in store.layout.layers}

    @property
    def activations(self) -> dict[int, np.ndarray]:
        """(num_experts,) int64 counts of gate choices since start, by layer; real tokens only."""
        return self._activations

    def run(self, work: ExpertWork, num_rows: int) -> Tensor:
        """The layer's routed output [T, D] in hidden_TD's dtype; rows from `num_rows` on are padding, zero."""
        T, D = work.hidden_TD.shape
        K = work.topk_ids_TK.shape[1]
        counts = self._activations[work.layer]
        wanted, offsets, pairs = self._compute.group(work.topk_ids_TK[:num_rows], counts)
        x_TD = work.hidden_TD[:num_rows].contiguous()
        y_PD = torch.empty((num_rows * K, D), dtype=torch.float32)
        for group in self._store.acquire(work.layer, wanted):
            weights = [weight for _, weight in group]
            if len(group) == len(wanted):
                self._compute.run(x_TD, weights, offsets, pairs, y_PD, top_k=K)
                break
            place = [wanted.index(expert) for expert, _ in group]
            spans = [pairs[offsets[i] : offsets[i + 1]] for i in place]
            starts = np.cumsum([0, *(len(span) for span in spans)])
            self._compute.run(x_TD, weights, starts, np.concatenate(spans), y_PD, top_k=K)
        out = self._compute.combine(y_PD, work.topk_weights_TK[:num_rows], work.hidden_TD.dtype)
        if num_rows == T:
            return out
        padded = torch.zeros_like(work.hidden_TD)
        padded[:num_rows] = out
        return padded
