"""Rows and choices of one layer that are computed together in one place.

Shapes: T token rows, D model dim, K experts per token (top-k); t the rows of one part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.data_plane.channel import ExpertChannel
from actors.data_plane.frames import DispatchFrame
from cluster.execution.host_times import HostTimes


@dataclass(frozen=True, slots=True, eq=False)
class SentFrame:
    """A part on its way. sent_s: time.monotonic. has_others: each of its experts has another owner."""

    channel: ExpertChannel
    frame: DispatchFrame
    times: HostTimes
    sent_s: float
    has_others: bool


@dataclass(slots=True, eq=False)
class RowShare:
    """What one owner is to compute. rows: of the layer; None: all of them. sent: None: nobody has it."""

    rows: np.ndarray | None
    ids_tK: np.ndarray
    weights_tK: np.ndarray
    sent: SentFrame | None = None

    def masked(self, keep_tK: np.ndarray, none: int) -> RowShare:
        """The choices where `keep_tK`, and only the rows that have one. Args: none: the id of a choice left out."""
        chosen: np.ndarray = np.any(keep_tK, axis=1)
        index = np.flatnonzero(chosen)
        if len(index) == len(chosen):
            rows, keep, ids, weights = self.rows, keep_tK, self.ids_tK, self.weights_tK
        else:
            rows = index if self.rows is None else self.rows[index]
            keep, ids, weights = keep_tK[index], self.ids_tK[index], self.weights_tK[index]
        return RowShare(rows, np.where(keep, ids, none), np.where(keep, weights, np.float32(0.0)))

    def experts(self, none: int) -> np.ndarray:
        """Distinct experts, ascending."""
        experts = np.unique(self.ids_tK)
        return experts[experts != none]


def as_wire(x_TD: Tensor) -> np.ndarray:
    """Rows as frames carry them: float32, or bfloat16 as uint16."""
    return x_TD.view(torch.uint16).numpy() if x_TD.dtype == torch.bfloat16 else x_TD.numpy()
