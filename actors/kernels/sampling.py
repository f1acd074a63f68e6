"""Binds sampling.h with ctypes: one token drawn from each row of logits. Knows pointers; knows nothing of requests.

Shapes: R rows that are drawn from, V vocabulary.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1024  # BLOCK of sampling.h
_ITEM_DOUBLES = 2


class Draw(ctypes.Structure):
    """What a row asks for; mirrors Draw of sampling.h. top_k 0, top_p 1 and min_p 0 ask for nothing."""

    _fields_ = (
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("uniform", ctypes.c_double),
        ("top_k", ctypes.c_int64),
    )


class SamplingKernel:
    """The compiled draw. Not thread-safe: it has one room to compute in."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._draw = library.moesaic_draw_tokens
        self._draw.argtypes = [pointer, size, size, size, pointer, pointer, pointer]
        self._draw.restype = None
        self._weights = library.moesaic_weights
        self._weights.argtypes = [pointer, size, ctypes.POINTER(Draw), pointer, pointer]
        self._weights.restype = ctypes.c_double
        self._room = np.empty(0)

    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """A token of each row; -1 for a row that has a NaN, an infinite logit, or no token that may be chosen.

        Args:
            logits_RV: float32, dense in V.
            draws: one of each row; temperatures above 0.
        """
        R, V = logits_RV.shape
        assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1 and len(draws) == R
        needed = V // _BLOCK + V + 2 * _ITEM_DOUBLES * V + 16
        if len(self._room) < needed:
            self._room = np.empty(needed)
        tokens = (ctypes.c_int64 * R)()
        self._draw(logits_RV.data_ptr(), logits_RV.stride(0), R, V, (Draw * R)(*draws), self._room.ctypes.data, tokens)
        return list(tokens)

    def weights(self, logits_V: Tensor, draw: Draw) -> tuple[np.ndarray, float]:
        """Weights [V] of the tokens of one row, before top_k and top_p, and their sum: for who checks the draw."""
        (V,) = logits_V.shape
        weights, sums = np.empty(V + 8), np.empty(V // _BLOCK + 2)
        total = self._weights(
            logits_V.contiguous().data_ptr(), V, ctypes.byref(draw), weights.ctypes.data, sums.ctypes.data
        )
        return weights[:V], total


def load_sampling_kernel() -> SamplingKernel | None:
    """The compiled draw, or None where it was not built."""
    spec = importlib.util.find_spec("actors.kernels._native")
    return None if spec is None or spec.origin is None else SamplingKernel(ctypes.CDLL(spec.origin))
