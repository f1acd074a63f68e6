"""Binds native.c with ctypes. Knows pointers and shapes; knows nothing of models or batches.

Shapes: T token rows, D model dim, I expert intermediate dim, K experts per token, R attention rows,
H query heads, G key-value heads, C head dim.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import struct
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "clamped_swiglu": 3}
FP8_CODE, MXFP4_CODE = 3, 4

_CHUNK_ROWS = 64


class KernelForm(ctypes.Structure):
    """What the experts of a model have in common; mirrors Form of native.c, where the fields are explained."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("transposed", ctypes.c_int32),
        ("joined", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("bias_dtype", ctypes.c_int32),
        ("block_rows", ctypes.c_int32),
        ("block_cols", ctypes.c_int32),
        ("isa_limit", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class ExpertPointers(ctypes.Structure):
    """Addresses of one expert's parts, None for what its form does not have; mirrors Expert of native.c."""

    _fields_ = tuple(
        (matrix + kind, ctypes.c_void_p) for kind in ("", "_scales", "_bias") for matrix in ("gate", "up", "down")
    )

    def moved(self, num_bytes: int) -> ExpertPointers:
        """The same parts, that many bytes further on."""
        names = [field[0] for field in self._fields_]
        addresses = [getattr(self, name) for name in names]
        return ExpertPointers(*(None if address is None else address + num_bytes for address in addresses))


class NativeKernels:
    """The compiled kernels. Not thread-safe: one instance per compute thread."""

    name = "native"

    def __init__(self, library: ctypes.CDLL, *, threads: int = 1) -> None:
        self.threads = threads
        self._lib = library
        self._ffn = _bind(library, "moesaic_experts_ffn", "ppilp" + "l" * 4 + "p" * 5 + "li")
        self._combine = _bind(library, "moesaic_combine", "pplllpi")
        self._group = _bind(library, "moesaic_group", "pll" + "p" * 4, returns=ctypes.c_int64)
        # PyDLL keeps the interpreter lock: to give it away and wait for it again takes longer than to count.
        self._count_choices = _bind(ctypes.PyDLL(library._name), "moesaic_count_choices", "pppilpllllllpp")
        self._append_kv = _bind(library, "moesaic_append_kv", "pllllpllllplppi")
        self._rope = _bind(library, "moesaic_rope", "pllpplllpi")
        self._linear = _bind(library, "moesaic_linear", "pipilllpp")
        self._rms_norm = _bind(library, "moesaic_rms_norm", "ppllfpi")
        self._attention = _bind(library, "moesaic_paged_attention", "pppppp" + "l" * 5 + "fpppi")
        self._latent_attention = _bind(library, "moesaic_latent_attention", "p" * 7 + "l" * 6 + "fppi")
        self._read_memory = _bind(library, "moesaic_read_memory", "pl", returns=ctypes.c_float)
        self._scratch = torch.empty(0, dtype=torch.float32)

    def group(self, topk_ids: Tensor, num_experts: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Sort gate choices by expert, stably.

        Args:
            topk_ids: int64, contiguous, any shape of P elements in [0, num_experts).
        Returns:
            The n experts chosen, ascending; (n + 1,) offsets; (P,) pairs: [offsets[i], offsets[i + 1]) are the i-th's.
        """
        P, E = topk_ids.numel(), num_experts
        buffer = np.empty(P + 3 * E + 1, dtype=np.int64)
        base = buffer.ctypes.data
        n = self._group(
            topk_ids.data_ptr(), P, E, base, base + 8 * P, base + 8 * (P + E), base + 8 * (P + 2 * E + 1)
        )  # fmt: skip
        return buffer[P : P + n].tolist(), buffer[P + E : P + E + n + 1], buffer[:P]

    def count_choices(
        self,
        layers: Sequence[int],
        topk_ids: Sequence[Tensor],
        topk_weights: Sequence[Tensor],
        clusters_T: Tensor | None,
        totals_L2E: Tensor,
        values_C2LE2: Tensor,
        *,
        num_rows: int,
        num_decode: int,
    ) -> None:
        """Add what a step's layers chose to counts by layer and phase; and by cluster of prompts, with its weights.

        Args:
            layers: which of L each is. topk_ids, topk_weights: (at least num_rows, K), contiguous, int64 in [0, E), and
                all of one dtype.
            clusters_T: int32, contiguous; -1 and None: the last of C.
            totals_L2E: int64. values_C2LE2: float64, contiguous.
            num_decode: so many rows count for the second phase, the rest of the first `num_rows` for the first.
        """
        num, (C, _, L, E, _) = len(layers), values_C2LE2.shape
        numbers = struct.Struct(f"{num}q")  # arrays of the language, three times as fast as ctypes has them
        self._count_choices(
            numbers.pack(*layers), numbers.pack(*[ids.data_ptr() for ids in topk_ids]),
            numbers.pack(*[weights.data_ptr() for weights in topk_weights]), DTYPE_CODES[topk_weights[0].dtype], num,
            None if clusters_T is None else clusters_T.data_ptr(), num_rows, topk_ids[0].size(1), num_decode, C, L, E,
            totals_L2E.data_ptr(), values_C2LE2.data_ptr(),
        )  # fmt: skip

    def experts_ffn(
        self,
        x_TD: Tensor,
        experts: Sequence[ExpertPointers],
        offsets: np.ndarray,
        pairs: np.ndarray,
        y_PD: Tensor,
        *,
        form: KernelForm,
        intermediate: int,
        top_k: int,
    ) -> None:
        """Gated FFN of several experts; rows of y_PD named by `pairs` receive unweighted outputs.

        Args:
            x_TD: float32 or bfloat16, contiguous.
            offsets: (len(experts) + 1,) int64; expert e computes pairs[offsets[e]:offsets[e + 1]].
            pairs: (S,) int64; pair t * top_k + k is row t's k-th choice.
            y_PD: (T * top_k, D) float32.
        """
        num = len(experts)
        addresses = (ctypes.c_void_p * num)(*map(ctypes.addressof, experts))
        T, D = x_TD.shape
        hidden_floats = (4 if form.joined else 2) * _CHUNK_ROWS * intermediate
        scratch = self._floats(hidden_floats + T * D).data_ptr()
        self._ffn(
            ctypes.addressof(form), x_TD.data_ptr(), DTYPE_CODES[x_TD.dtype], T, scratch + 4 * hidden_floats, D,
            intermediate, top_k, num, ctypes.addressof(addresses), offsets.ctypes.data, pairs.ctypes.data,
            y_PD.data_ptr(), scratch, _CHUNK_ROWS, self.threads,
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
        """Write key and value [1, G, T, C], rows dense in C, to rows `slots` (T,) of the caches [num_slots, G, C].

        Keys and values may differ in G and C.
        """
        _, Gk, T, Ck = key.shape
        _, Gv, _, Cv = value.shape
        self._append_kv(
            key.data_ptr(), key.stride(1), key.stride(2), Gk, Ck, value.data_ptr(), value.stride(1), value.stride(2),
            Gv, Cv, slots.data_ptr(), T, k_cache.data_ptr(), v_cache.data_ptr(), key.element_size(),
        )  # fmt: skip

    def paged_attention(
        self,
        q_RHC: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        starts: Tensor,
        ends: Tensor,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of R rows over their own KV slots: row r sees slots[starts[r]:ends[r]].

        Args:
            q_RHC: contiguous, in the cache's dtype.
            k_cache, v_cache: (num_slots, G, C) and (num_slots, G, Cv).
            slots, starts, ends: int64.
            sinks: (H,) float32: one more score of each head, whose share of the attention goes nowhere.
        Returns:
            (R, H, Cv)
        """
        R, H, C = q_RHC.shape
        _, G, Cv = v_cache.shape
        out = torch.empty((R, H, Cv), dtype=q_RHC.dtype)
        scratch = self._floats(C + Cv + int(slots.numel()) + 16)
        self._attention(
            q_RHC.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr(), starts.data_ptr(),
            ends.data_ptr(), R, H, G, C, Cv, scale, None if sinks is None else sinks.data_ptr(), out.data_ptr(),
            scratch.data_ptr(), DTYPE_CODES[q_RHC.dtype],
        )  # fmt: skip
        return out

    def latent_attention(
        self,
        q_RHC: Tensor,
        latents: Tensor,
        ropes: Tensor,
        up_HCL: Tensor,
        slots: Tensor,
        starts: Tensor,
        ends: Tensor,
        scale: float,
    ) -> Tensor:
        """Multi-head latent attention that never expands the latents; slots, starts and ends as in paged_attention.

        Args:
            q_RHC: (R, H, N + P), contiguous: the part without position and the rotated part.
            latents, ropes: (num_slots, 1, L) and (num_slots, 1, P).
            up_HCL: (H, N + V, L), contiguous: each head's up-projection to keys, then to values.
        Returns:
            (R, H, V)
        """
        R, H, C = q_RHC.shape
        L, P = latents.shape[-1], ropes.shape[-1]
        N, V = C - P, up_HCL.shape[1] - (C - P)
        out = torch.empty((R, H, V), dtype=q_RHC.dtype)
        scratch = self._floats(C + 2 * L + V + int(slots.numel()) + 16)
        self._latent_attention(
            q_RHC.data_ptr(), latents.data_ptr(), ropes.data_ptr(), up_HCL.data_ptr(), slots.data_ptr(),
            starts.data_ptr(), ends.data_ptr(), R, H, N, P, V, L, scale, out.data_ptr(), scratch.data_ptr(),
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
