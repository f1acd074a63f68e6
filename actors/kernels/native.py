"""Binds native.c with ctypes. Knows pointers and shapes; knows nothing of models or batches.

Shapes: T token rows, D model dim, I expert intermediate dim, K experts per token, R attention rows,
H query heads, G key-value heads, C head dim.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2}

_CHUNK_ROWS = 64


@dataclass(frozen=True, slots=True)
class ExpertPointers:
    """Addresses of one expert's matrices: gate and up [I, D], down [D, I], row-major."""

    gate: int
    up: int
    down: int


class NativeKernels:
    """The compiled kernels. Not thread-safe: one instance per compute thread."""

    name = "native"

    def __init__(self, library: ctypes.CDLL, *, threads: int = 1) -> None:
        self.threads = threads
        self._lib = library
        self._ffn = _bind(library, "moesaic_experts_ffn", "iip" + "l" * 4 + "ppppp" + "ppli")
        self._combine = _bind(library, "moesaic_combine", "pplllpi")
        self._widen = _bind(library, "moesaic_widen", "pipl")
        self._linear = _bind(library, "moesaic_linear", "pipilllpp")
        self._rms_norm = _bind(library, "moesaic_rms_norm", "ppllfpi")
        self._attention = _bind(library, "moesaic_paged_attention", "pppppp" + "l" * 4 + "fppi")
        self._scratch = torch.empty(0, dtype=torch.float32)

    def widen(self, x: Tensor) -> Tensor:
        """float32 copy of a contiguous tensor; itself when it is float32 already."""
        if x.dtype == torch.float32:
            return x
        out = torch.empty(x.shape, dtype=torch.float32)
        self._widen(x.data_ptr(), DTYPE_CODES[x.dtype], out.data_ptr(), x.numel())
        return out

    def experts_ffn(
        self,
        x_TD: Tensor,
        experts: Sequence[ExpertPointers],
        offsets: Tensor,
        pairs: Tensor,
        y_PD: Tensor,
        *,
        weight_dtype: torch.dtype,
        intermediate: int,
        top_k: int,
        activation: str,
    ) -> None:
        """Gated FFN of several experts; rows of y_PD named by `pairs` receive unweighted outputs.

        Args:
            x_TD: float32, contiguous.
            offsets: (len(experts) + 1,) int64; expert e computes pairs[offsets[e]:offsets[e + 1]].
            pairs: (S,) int64; pair t * top_k + k is row t's k-th choice.
            y_PD: (T * top_k, D) float32.
        """
        num = len(experts)
        addresses = (ctypes.c_void_p * (3 * num))()
        for i, expert in enumerate(experts):
            addresses[i], addresses[num + i], addresses[2 * num + i] = expert.gate, expert.up, expert.down
        base = ctypes.addressof(addresses)
        scratch = self._floats(2 * _CHUNK_ROWS * intermediate)
        self._ffn(
            DTYPE_CODES[weight_dtype], ACTIVATION_CODES[activation], x_TD.data_ptr(), x_TD.shape[1], intermediate,
            top_k, num, base, base + 8 * num, base + 16 * num, offsets.data_ptr(), pairs.data_ptr(),
            y_PD.data_ptr(), scratch.data_ptr(), _CHUNK_ROWS, self.threads,
        )  # fmt: skip

    def combine(self, y_PD: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """Weighted sum over each row's experts, in gate order, in float32; result [T, D] in `dtype`."""
        T, K = weights_TK.shape
        D = y_PD.shape[1]
        out = torch.empty((T, D), dtype=dtype)
        self._combine(y_PD.data_ptr(), weights_TK.data_ptr(), T, K, D, out.data_ptr(), DTYPE_CODES[dtype])
        return out

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., D] times weight [N, D] transposed, summed in float32, result in x's dtype."""
        D, N = x.shape[-1], weight.shape[0]
        T = x.numel() // D
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], N), dtype=x.dtype)
        scratch = self._floats(32 * (D + N))
        self._linear(
            x.data_ptr(), DTYPE_CODES[x.dtype], weight.data_ptr(), DTYPE_CODES[weight.dtype], T, D, N,
            out.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dim, rounded where the model code rounds."""
        x = x.contiguous()
        D = x.shape[-1]
        out = torch.empty(x.shape, dtype=x.dtype)
        self._rms_norm(
            x.data_ptr(), weight.data_ptr(), x.numel() // D, D, eps, out.data_ptr(), DTYPE_CODES[x.dtype]
        )
        return out

    def paged_attention(
        self, q_RHC: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, scale: float
    ) -> Tensor:
        """Attention of R rows over their own KV slots: row r sees slots[starts[r]:ends[r]].

        Args:
            q_RHC: contiguous, in the cache's dtype.
            k_cache, v_cache: (num_slots, G, C).
            slots, starts, ends: int64.
        """
        R, H, C = q_RHC.shape
        out = torch.empty_like(q_RHC)
        scratch = self._floats(2 * C + int(slots.numel()) + 16)
        self._attention(
            q_RHC.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), starts.data_ptr(),
            ends.data_ptr(), R, H, k_cache.shape[1], C, scale, out.data_ptr(), scratch.data_ptr(),
            DTYPE_CODES[q_RHC.dtype],
        )  # fmt: skip
        return out

    def _floats(self, num: int) -> Tensor:
        if self._scratch.numel() < num:
            self._scratch = torch.empty(num, dtype=torch.float32)
        return self._scratch


def load_native(*, threads: int = 1) -> NativeKernels | None:
    """The compiled kernels, or None where they were not built."""
    spec = importlib.util.find_spec("actors.kernels._native")
    if spec is None or spec.origin is None:
        return None
    return NativeKernels(ctypes.CDLL(spec.origin), threads=threads)


def _bind(library: ctypes.CDLL, name: str, signature: str) -> ctypes._NamedFuncPointer:
    kinds = {"i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
    function = getattr(library, name)
    function.argtypes = [kinds[letter] for letter in signature]
    function.restype = None
    return function
