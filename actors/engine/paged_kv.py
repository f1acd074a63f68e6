"""The pages of one layer: what each token leaves behind, and attention over it.

Two kinds: keys and values of every KV head, or multi-head latent attention, whose pages hold the latents and are
expanded only for the chunk of a prompt at hand. Knows tensors and slots; knows no sequences.

Shapes: T packed rows, R decode rows, S rows of one sequence so far, H query heads, G key-value heads, C key dim,
N its part without position, P its rotated part, V value dim, L latent dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.step import Span, StepInputs
from actors.kernels.native import NativeKernels
from actors.model.attention_layers import AttentionLayer, expand_latents, leave_latents


class PagedKv:
    """Keys [num_slots, G, C] and values [num_slots, G, V] of one layer."""

    def __init__(
        self, layer: AttentionLayer, *, num_slots: int, dtype: torch.dtype, native: NativeKernels | None
    ) -> None:
        self._layer = layer
        self._native = native
        self._keys = torch.zeros((num_slots, *layer.key_shape), dtype=dtype)
        self._values = torch.zeros((num_slots, *layer.value_shape), dtype=dtype)

    def append(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write the step's rows, [1, G, T, C] and [1, G, T, V]."""
        if self._native is not None and key.stride(3) == value.stride(3) == 1:
            self._native.append_kv(key, value, slots, self._keys, self._values)
            return
        self._keys.index_copy_(0, slots, key[0].transpose(0, 1))
        self._values.index_copy_(0, slots, value[0].transpose(0, 1))

    def attend(self, query: Tensor, scale: float, step: StepInputs) -> Tensor:
        """Attention of the step's rows, each over its own sequence: [1, H, T, C] in, [1, T, H, V] out."""
        rows_THC = query[0].transpose(0, 1).contiguous()
        if step.num_single == len(rows_THC):
            return self._attend_decode(rows_THC, step, scale).unsqueeze(0)
        parts = [self._attend_decode(rows_THC[: step.num_single], step, scale)] if step.num_single else []
        parts += [self._attend_span(rows_THC[span.start : span.stop], span, scale) for span in step.prefill]
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        if step.num_rows < len(rows_THC):
            out = F.pad(out, (0, 0, 0, 0, 0, len(rows_THC) - step.num_rows))
        return out.unsqueeze(0)

    def _attend_decode(self, q_RHC: Tensor, step: StepInputs, scale: float) -> Tensor:
        starts, ends = step.decode_starts, step.decode_ends
        if self._layer.window is not None:
            starts = torch.maximum(starts, ends - self._layer.window)
        if self._native is not None:
            return self._paged(self._native, q_RHC, step.decode_slots, starts, ends, scale)
        rows = [
            _sdpa(q_RHC[i : i + 1], *self._gather(step.decode_slots[start:end]), scale, None, self._layer.sinks)
            for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
        ]
        return torch.cat(rows)

    def _attend_span(self, q_THC: Tensor, span: Span, scale: float) -> Tensor:
        window = self._layer.window
        first = 0 if window is None else max(0, len(span.slots) - len(q_THC) - window + 1)
        keys, values = self._gather(torch.from_numpy(span.slots[first:]))
        return _sdpa(q_THC, keys, values, scale, window, self._layer.sinks)

    def _paged(
        self, native: NativeKernels, q_RHC: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, scale: float
    ) -> Tensor:
        return native.paged_attention(q_RHC, self._keys, self._values, slots, starts, ends, scale, self._layer.sinks)

    def _gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [S, G, C] and values [S, G, V] of the slots."""
        return self._keys[slots], self._values[slots]


class LatentKv(PagedKv):
    """Latents [num_slots, 1, L] and rotated keys [num_slots, 1, P], shared by all heads.

    Decoding never expands them (the up-projection moves to the query and to the result); a prompt's chunk expands its
    sequence's rows for the moment, as the model itself does.
    """

    def __init__(
        self, layer: AttentionLayer, *, num_slots: int, dtype: torch.dtype, native: NativeKernels | None
    ) -> None:
        super().__init__(layer, num_slots=num_slots, dtype=dtype, native=native)
        assert layer.latent is not None
        self._module = layer.latent
        leave_latents(self._module)
        weight: Tensor = self._module.kv_b_proj.weight  # type: ignore[union-attr, assignment]
        self._up_HCL = weight.data.view(layer.num_heads, -1, layer.key_shape[1])

    def _paged(
        self, native: NativeKernels, q_RHC: Tensor, slots: Tensor, starts: Tensor, ends: Tensor, scale: float
    ) -> Tensor:
        return native.latent_attention(q_RHC, self._keys, self._values, self._up_HCL, slots, starts, ends, scale)

    def _gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        latents, ropes = (pages[slots].transpose(0, 1).unsqueeze(0) for pages in (self._keys, self._values))
        keys, values = expand_latents(self._module, latents, ropes)
        return keys[0].transpose(0, 1), values[0].transpose(0, 1)


def paged_kv(layer: AttentionLayer, *, num_slots: int, dtype: torch.dtype, native: NativeKernels | None) -> PagedKv:
    """The pages that the layer needs."""
    kind = PagedKv if layer.latent is None else LatentKv
    return kind(layer, num_slots=num_slots, dtype=dtype, native=native)


def _sdpa(
    q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """Causal attention of the last T of S positions."""
    T, S = len(q_THC), len(k_SGC)
    mask = None
    if T > 1:
        query_at = torch.arange(S - T, S)[:, None]
        key_at = torch.arange(S)[None, :]
        mask = key_at <= query_at
        if window is not None:
            mask &= key_at > query_at - window
    if sinks is not None:  # a sink is a key of zeros, so its score is the bias alone, with a value of zeros
        visible = torch.ones(T, S, dtype=torch.bool) if mask is None else mask
        bias = torch.zeros(T, S).masked_fill(~visible, -torch.inf)
        columns = bias.expand(len(sinks), T, S), sinks[:, None, None].expand(-1, T, 1)
        mask = torch.cat(columns, dim=2).to(q_THC.dtype)
        k_SGC, v_SGC = (F.pad(rows, (0, 0, 0, 0, 0, 1)) for rows in (k_SGC, v_SGC))
    out = F.scaled_dot_product_attention(
        q_THC.transpose(0, 1)[None],
        k_SGC.transpose(0, 1)[None],
        v_SGC.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=q_THC.shape[1] != k_SGC.shape[1],
    )
    return out[0].transpose(0, 1)
