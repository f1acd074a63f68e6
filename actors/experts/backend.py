"""The experts of one process: rows and gate choices in, partial sums out. The fourth of an expert host's four classes.

Composes expert memory and kernels; knows nothing of sequences, sockets or who asks. Every pair (row, gate rank) has its
own output row, and a row's pairs are summed in gate order in float32 whatever the order of execution, so that cache
state, batch and hosts cannot change a result.

Shapes: T token rows, D model dim, K experts per token (top-k), P = T * K pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.data_plane.frames import FrameError
from actors.experts.compute import ExpertCompute
from actors.experts.memory.store import ExpertStore


class LoadTimes(NamedTuple):
    """stall_s: that batches have waited for experts since start. load_s, load_cpu_s: of one load, on average."""

    stall_s: float
    load_s: float
    load_cpu_s: float


class ExpertBackend:
    """Runs experts from one expert memory."""

    def __init__(self, store: ExpertStore, compute: ExpertCompute) -> None:
        self.store = store
        self.compute = compute
        self._num_experts = store.layout.num_experts

    def check(self, layer: int, width: int, ids_TK: np.ndarray) -> None:
        """Refuse what a kernel could not survive; for rows that come from another process.

        Args:
            width: of the rows. ids_TK: not empty.
        Raises:
            FrameError: no such layer or expert, rows of another width, or more choices than experts.
        """
        hidden = self.store.layout.hidden
        if layer not in self.store.layout.layers or width != hidden:
            raise FrameError(f"rows of {width} for layer {layer}; this model has {hidden}")
        if ids_TK.shape[1] > self._num_experts:
            raise FrameError(f"{ids_TK.shape[1]} choices a row; there are {self._num_experts} experts")
        low, high = int(ids_TK.min()), int(ids_TK.max())
        if low < 0 or high > self._num_experts:
            raise FrameError(f"expert {low if low < 0 else high} of layer {layer}; there are {self._num_experts}")

    def load_times(self) -> LoadTimes:
        """What its memory's loads cost."""
        store = self.store
        return LoadTimes(store.counters.total_stall_s, store.load_s(), store.load_cpu_s())

    def partial_sums(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Weighted sums [T, D] in `dtype` of the experts chosen.

        Args:
            ids_TK: int64; num_experts where a choice is not for this process (its weight must be 0).
        """
        T, D = x_TD.shape
        K = ids_TK.shape[1]
        y_PD = torch.empty((T * K, D), dtype=torch.float32)
        wanted, offsets, pairs = self.compute.group(ids_TK, self._num_experts + 1)
        if wanted and wanted[-1] == self._num_experts:
            y_PD[torch.from_numpy(pairs[offsets[-2] :])] = 0.0  # added with weight 0: must be finite
            wanted, offsets = wanted[:-1], offsets[:-1]
        self._run(layer, x_TD.contiguous(), wanted, offsets, pairs, y_PD, top_k=K)
        return self.compute.combine(y_PD, weights_TK, dtype)

    def _run(
        self,
        layer: int,
        x_TD: Tensor,
        wanted: list[int],
        offsets: np.ndarray,
        pairs: np.ndarray,
        y_PD: Tensor,
        *,
        top_k: int,
    ) -> None:
        for group in self.store.acquire(layer, wanted):
            weights = [weight for _, weight in group]
            if len(group) == len(wanted):
                self.compute.run(x_TD, weights, offsets, pairs[: offsets[-1]], y_PD, top_k=top_k)
                return
            place = [wanted.index(expert) for expert, _ in group]
            spans = [pairs[offsets[i] : offsets[i + 1]] for i in place]
            starts = np.cumsum([0, *(len(span) for span in spans)])
            self.compute.run(x_TD, weights, starts, np.concatenate(spans), y_PD, top_k=top_k)
