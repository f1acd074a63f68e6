"""Binds native.c with ctypes. Knows pointers and shapes; knows nothing of models or batches.

Shapes: T token rows, D model dim, I expert intermediate dim, K experts per token, R attention rows,
H query heads, G key-value heads, C head dim.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
        self._ffn = _bind(library, "moesaic_experts_ffn", "iipilp" + "l" * 4 + "ppppp" + "ppli")
        self._combine = _bind(library, "moesaic_combine", "pplllpi")
        self._group = _bind(library, "moesaic_group", "pll" + "p" * 5, returns=ctypes.c_int64)
        self._append_kv = _bind(library, "moesaic_append_kv", "pllpllplllppi")
        self._rope = _bind(library, "moesaic_rope", "pllpplllpi")
        self._linear = _bind(library, "moesaic_linear", "pipilllpp")
        self._rms_norm = _bind(library, "moesaic_rms_norm", "ppllfpi")
        self._attention = _bind(library, "moesaic_paged_attention", "pppppp" + "l" * 4 + "fppi")
        self._read_memory = _bind(library, "moesaic_read_memory", "pl", returns=ctypes.c_float)
        self._scratch = torch.empty(0, dtype=torch.float32)

    def group(self, topk_ids: Tensor, counts: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Sort gate choices by expert, stably.

        Args:
            topk_ids: int64, contiguous, any shape of P elements in [0, num_experts).
            counts: (num_experts,) int64; each expert's number of choices is added.
        Returns:
            The n experts chosen, ascending; (n + 1,) offsets; (P,) pairs: [offsets[i], offsets[i + 1]) are the i-th's.
        """
        P, E = topk_ids.numel(), len(counts)
        buffer = np.empty(P + 3 * E + 1, dtype=np.int64)
        base = buffer.ctypes.data
        n = self._group(
            topk_ids.data_ptr(), P, E, counts.ctypes.data, base, base + 8 * P, base + 8 * (P + E),
            base + 8 * (P + 2 * E + 1),
        )  # fmt: skip
        return buffer[P : P + n].tolist(), buffer[P + E : P + E + n + 1], buffer[:P]

    def experts_ffn(
        self,
        x_TD: Tensor,
        experts: Sequence[ExpertPointers],
        offsets: np.ndarray,
        pairs: np.ndarray,
        y_PD: Tensor,
        *,
        weight_dtype: torch.dtype,
        intermediate: int,
        top_k: int,
        activation: str,
    ) -> None:
        """Gated FFN of several experts; rows of y_PD named by `pairs` receive unweighted outputs.

        Args:
            x_TD: float32 or bfloat16, contiguous.
            offsets: (len(experts) + 1,) int64; expert e computes pairs[offsets[e]:offsets[e + 1]].
            pairs: (S,) int64; pair t * top_k + k is row t's k-th choice.
            y_PD: (T * top_k, D) float32.
        """
        num = len(experts)
        addresses = (ctypes.c_void_p * (3 * num))()
        for i, expert in enumerate(experts):
            addresses[i], addresses[num + i], addresses[2 * num + i] = expert.gate, expert.up, expert.down
        base = ctypes.addressof(addresses)
        T, D = x_TD.shape
        hidden_floats = 2 * _CHUNK_ROWS * intermediate
        scratch = self._floats(hidden_floats + T * D).data_ptr()
        self._ffn(
            DTYPE_CODES[weight_dtype], ACTIVATION_CODES[activation], x_TD.data_ptr(), DTYPE_CODES[x_TD.dtype], T,
            scratch + 4 * hidden_floats, D, intermediate, top_k, num, base, base + 8 * num, base + 16 * num,
            offsets.ctypes.data, pairs.ctypes.data, y_PD.data_ptr(), scratch, _CHUNK_ROWS, self.threads,
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
        self._rms_norm(x.data_ptr(), weight.data_ptr(), x.numel() // D, D, eps, out.data_ptr(), DTYPE_CODES[x.dtype])
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate halves: x [1, H, T, C], cos and sin [1, T, C], all of one dtype, rows dense in C."""
        _, H, T, C = x.shape
        out = torch.empty((1, H, T, C), dtype=x.dtype)
        self._rope(
            x.data_ptr(), x.stride(1), x.stride(2), cos.data_ptr(), sin.data_ptr(), H, T, C, out.data_ptr(),
            DTYPE_CODES[x.dtype],
        )  # fmt: skip
        return out

    def append_kv(self, key: Tensor, value: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Write key and value [1, G, T, C], rows dense in C, to rows `slots` (T,) of the caches [num_slots, G, C]."""
        _, G, T, C = key.shape
        self._append_kv(
            key.data_ptr(), key.stride(1), key.stride(2), value.data_ptr(), value.stride(1), value.stride(2),
            slots.data_ptr(), T, G, C, k_cache.data_ptr(), v_cache.data_ptr(), key.element_size(),
        )  # fmt: skip

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

    def read_bandwidth(self, num_bytes: int) -> float:
        """Bytes per second at which one core reads that much memory, once."""
        block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
        floats = np.frombuffer(block, dtype=np.float32)
        floats[:] = 1.0
        began = time.perf_counter()
        self._read_memory(floats.ctypes.data, num_bytes)
        return num_bytes / (time.perf_counter() - began)

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


def _bind(library: ctypes.CDLL, name: str, signature: str, returns: type | None = None) -> ctypes._NamedFuncPointer:
    kinds = {"i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
    function = getattr(library, name)
    function.argtypes = [kinds[letter] for letter in signature]
    function.restype = returns
    return function
