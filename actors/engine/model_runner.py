"""One packed forward over the batch, suspended at every MoE layer. Step 5 of a request's walk.

Knows tensors of one step; knows nothing of requests. The forward runs in a greenlet; when a layer
needs its experts the greenlet switches to its driver with the work and is resumed with the result.
A driver may hold several forwards (micro-batches) and interleave them layer by layer.

Shapes: T packed rows, R sampled rows, H query heads, G key-value heads, C head dim, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import greenlet
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.batcher import ScheduledRows
from actors.experts.dispatch import ExpertWork, LocalDispatcher
from actors.kernels.native import NativeKernels
from actors.model.checkpoint import LoadedModel
from actors.model.seams import PackedCache, bind

_ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows [start, stop) of the step belong to one sequence whose KV slots, after the step, are `slots`."""

    start: int
    stop: int
    slots: np.ndarray


@dataclass(slots=True)
class StepInputs:
    """One micro-batch, packed. Decode spans (one row each) come first."""

    token_ids: Tensor
    positions: Tensor
    write_slots: Tensor
    sampled_rows: Tensor
    num_rows: int
    num_decode: int
    prefill: list[_Span]
    decode_slots: Tensor
    decode_starts: Tensor
    decode_ends: Tensor


class ModelRunner:
    """Owns the dense model and the KV pages; computes steps."""

    def __init__(
        self,
        loaded: LoadedModel,
        dispatcher: LocalDispatcher,
        native: NativeKernels | None,
        *,
        num_blocks: int,
        block_size: int,
        native_rows: int = 0,
    ) -> None:
        """Args: native_rows: up to this many rows dense layers run compiled, and oneDNN's set-up cost is avoided."""
        self.model = loaded.model
        self._dispatcher = dispatcher
        self._native = native
        self._native_rows = native_rows
        self._pads_rows = loaded.dtype != torch.float32  # oneDNN compiles a kernel per shape: keep them few
        config = loaded.model.config.get_text_config()
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_blocks * block_size, heads, dim)
        self._keys = [torch.zeros(shape, dtype=loaded.dtype) for _ in range(config.num_hidden_layers)]
        self._values = [torch.zeros(shape, dtype=loaded.dtype) for _ in range(config.num_hidden_layers)]
        self._cache = PackedCache(self)
        self._current: StepInputs | None = None
        bind(self.model, self)

    def execute(self, rows: Seq[ScheduledRows]) -> Tensor:
        """Compute the rows; logits [R, V] of the rows that sample, in order."""
        return self.execute_interleaved([rows])[0]

    def execute_interleaved(self, micro_batches: Seq[Seq[ScheduledRows]]) -> list[Tensor]:
        """Compute several micro-batches, resuming each in turn at every MoE layer; logits of each."""
        forwards = [(self._prepare(rows), greenlet.greenlet(self._forward)) for rows in micro_batches]
        results: list[Tensor | None] = [None] * len(forwards)
        answers: list[object] = [step for step, _ in forwards]
        active = list(range(len(forwards)))
        while active:
            for i in list(active):
                step, forward = forwards[i]
                self._current = step
                with _step_context(onednn=len(step.token_ids[0]) > self._native_rows):
                    asked = forward.switch(answers[i])
                if forward.dead:
                    results[i] = asked
                    active.remove(i)
                else:
                    answers[i] = self._dispatcher.run(asked, step.num_rows)
        return [logits for logits in results if logits is not None]

    def attend(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        step = self._step()
        rows_THC = query[0].transpose(0, 1).contiguous()
        if step.num_decode == len(rows_THC):
            return self._attend_decode(layer, rows_THC, step, scale, window).unsqueeze(0)
        out = torch.zeros_like(rows_THC) if step.num_rows < len(rows_THC) else torch.empty_like(rows_THC)
        if step.num_decode:
            out[: step.num_decode] = self._attend_decode(layer, rows_THC[: step.num_decode], step, scale, window)
        for span in step.prefill:
            out[span.start : span.stop] = self._attend_span(
                layer, rows_THC[span.start : span.stop], span, scale, window
            )
        return out.unsqueeze(0)

    def append_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        slots = self._step().write_slots
        if self._native is not None and key.stride(3) == value.stride(3) == 1:
            self._native.append_kv(key, value, slots, self._keys[layer], self._values[layer])
            return
        self._keys[layer].index_copy_(0, slots, key[0].transpose(0, 1))
        self._values[layer].index_copy_(0, slots, value[0].transpose(0, 1))

    def run_experts(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The suspension point: hands the work to whoever drives this forward."""
        driver = greenlet.getcurrent().parent
        assert driver is not None, "experts outside a driven forward"
        return driver.switch(ExpertWork(layer, hidden, topk_ids, topk_weights))

    def _forward(self, step: StepInputs) -> Tensor:
        hidden = self.model.model(
            input_ids=step.token_ids,
            position_ids=step.positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[0]
        return self.model.lm_head(hidden[step.sampled_rows])

    def _prepare(self, rows: Seq[ScheduledRows]) -> StepInputs:
        ordered = sorted(rows, key=lambda r: r.num_rows > 1)
        tokens: list[int] = []
        positions: list[int] = []
        write: list[np.ndarray] = []
        spans: list[_Span] = []
        for item in ordered:
            sequence, first = item.sequence, item.sequence.computed
            last = first + item.num_rows
            spans.append(_Span(len(tokens), len(tokens) + item.num_rows, sequence.slots[:last]))
            tokens.extend(sequence.tokens[first:last])
            positions.extend(range(first, last))
            write.append(sequence.slots[first:last])
        num_rows = len(tokens)
        padding = self._padded(num_rows) - num_rows
        write.append(np.zeros(padding, dtype=np.int64))  # block 0 takes what padding rows write
        place = {id(item.sequence): span for item, span in zip(ordered, spans, strict=True)}
        num_decode = sum(1 for item in ordered if item.num_rows == 1)
        lengths = np.array([len(span.slots) for span in spans[:num_decode]], dtype=np.int64)
        ends = np.cumsum(lengths)
        decode = [span.slots for span in spans[:num_decode]] or [np.empty(0, dtype=np.int64)]
        return StepInputs(
            token_ids=torch.tensor([tokens + [0] * padding]),
            positions=torch.tensor([positions + [0] * padding]),
            write_slots=torch.from_numpy(np.concatenate(write)),
            sampled_rows=torch.tensor([place[id(r.sequence)].stop - 1 for r in rows if r.samples], dtype=torch.int64),
            num_rows=num_rows,
            num_decode=num_decode,
            prefill=spans[num_decode:],
            decode_slots=torch.from_numpy(np.concatenate(decode)),
            decode_starts=torch.from_numpy(ends - lengths),
            decode_ends=torch.from_numpy(ends),
        )

    def _attend_decode(self, layer: int, q_RHC: Tensor, step: StepInputs, scale: float, window: int | None) -> Tensor:
        starts, ends = step.decode_starts, step.decode_ends
        if window is not None:
            starts = torch.maximum(starts, ends - window)
        keys, values = self._keys[layer], self._values[layer]
        if self._native is not None:
            return self._native.paged_attention(q_RHC, keys, values, step.decode_slots, starts, ends, scale)
        rows = [
            _sdpa(q_RHC[i : i + 1], keys[slots], values[slots], scale, None)
            for i in range(len(q_RHC))
            for slots in (step.decode_slots[int(starts[i]) : int(ends[i])],)
        ]
        return torch.cat(rows)

    def _attend_span(self, layer: int, q_THC: Tensor, span: _Span, scale: float, window: int | None) -> Tensor:
        slots = torch.from_numpy(span.slots)
        return _sdpa(q_THC, self._keys[layer][slots], self._values[layer][slots], scale, window)

    def _step(self) -> StepInputs:
        assert self._current is not None, "attention outside a step"
        return self._current

    def _padded(self, num_rows: int) -> int:
        if not self._pads_rows:
            return num_rows
        return next((bucket for bucket in _ROW_BUCKETS if bucket >= num_rows), num_rows)


@contextlib.contextmanager
def _step_context(*, onednn: bool) -> Iterator[None]:
    """Modes of the thread and the process while a forward runs; entered anew at every switch, so that interleaved
    forwards leave everything as they found it.

    oneDNN sets every call up anew (50 us); the few small products left to torch are faster without it.
    """
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = onednn
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.mkldnn.enabled = before


def _sdpa(q_THC: Tensor, k_SGC: Tensor, v_SGC: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of the last T of S positions."""
    T, S = len(q_THC), len(k_SGC)
    if T == 1 and window is None:
        mask = None
    else:
        query_at = torch.arange(S - T, S)[:, None]
        key_at = torch.arange(S)[None, :]
        mask = key_at <= query_at
        if window is not None:
            mask &= key_at > query_at - window
    out = F.scaled_dot_product_attention(
        q_THC.transpose(0, 1)[None],
        k_SGC.transpose(0, 1)[None],
        v_SGC.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=q_THC.shape[1] != k_SGC.shape[1],
    )
    return out[0].transpose(0, 1)
