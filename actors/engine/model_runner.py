"""One packed forward over the batch, suspended at every MoE layer. Step 5 of a request's walk.

Knows tensors of one step; knows nothing of requests. The forward runs in a greenlet; when a layer
needs its experts the greenlet switches to its driver with the work and is resumed with the result.
A driver may hold several forwards (micro-batches) and interleave them layer by layer.

Shapes: T packed rows, R rows that need logits, H query heads, C key dim, N vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from functools import partial

import greenlet
import torch
from torch import Tensor

from actors.engine.batcher import ScheduledRows
from actors.engine.paged_kv import paged_kv
from actors.engine.step import StepInputs, pack_rows
from actors.experts.dispatch import Dispatcher, ExpertWork
from actors.kernels.native import NativeKernels
from actors.model.checkpoint import LoadedModel
from actors.model.seams import PackedCache, bind

_ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


class ModelRunner:
    """Owns the dense model and the KV pages; computes steps."""

    def __init__(
        self,
        loaded: LoadedModel,
        dispatcher: Dispatcher,
        native: NativeKernels | None,
        *,
        num_blocks: int,
        block_size: int,
        native_rows: int = 0,
    ) -> None:
        """Args: native_rows: up to this many rows dense layers run compiled, and oneDNN's set-up cost is avoided."""
        self.model = loaded.model
        self._dispatcher = dispatcher
        self._native_rows = native_rows
        # oneDNN compiles a kernel per shape: keep them few
        self._buckets = _ROW_BUCKETS if loaded.dtype != torch.float32 else ()
        self._kv = [
            paged_kv(layer, num_slots=num_blocks * block_size, dtype=loaded.dtype, native=native)
            for layer in loaded.attention
        ]
        self._cache = PackedCache(self)
        self._current: StepInputs | None = None
        bind(self.model, self)

    def execute(self, rows: Seq[ScheduledRows]) -> Tensor:
        """Compute the rows; logits [R, N] of the rows that need them, in order."""
        return self.execute_interleaved([rows])[0]

    def execute_interleaved(self, micro_batches: Seq[Seq[ScheduledRows]]) -> list[Tensor]:
        """Compute several micro-batches, resuming each in turn at every MoE layer; logits of each.

        While the experts of one work elsewhere, the next one's attention is computed (ping-pong, MegaScale-Infer).
        """
        forwards = [(pack_rows(rows, self._buckets), greenlet.greenlet(self._forward)) for rows in micro_batches]
        results: list[Tensor | None] = [None] * len(forwards)
        fetch: list[Callable[[], object]] = [partial(_itself, step) for step, _ in forwards]
        active = list(range(len(forwards)))
        while active:
            for i in list(active):
                step, forward = forwards[i]
                answer = fetch[i]()
                self._current = step
                with _step_context(onednn=len(step.token_ids[0]) > self._native_rows):
                    asked = forward.switch(answer)
                if forward.dead:
                    results[i] = asked
                    active.remove(i)
                else:
                    fetch[i] = self._dispatcher.start(asked, step.num_rows, step.num_decode)
        return [logits for logits in results if logits is not None]

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        return self._kv[layer].attend(query, scale, self._step())

    def append_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._kv[layer].append(key, value, self._step().write_slots)

    def run_experts(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The suspension point: hands the work to whoever drives this forward."""
        driver = greenlet.getcurrent().parent
        assert driver is not None, "experts outside a driven forward"
        return driver.switch(ExpertWork(layer, hidden, topk_ids, topk_weights))

    def _forward(self, step: StepInputs) -> Tensor:
        # The whole model, not its decoder and head: some families scale or cap their logits.
        return self.model(
            input_ids=step.token_ids,
            position_ids=step.positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=step.scored_rows,
        ).logits[0]

    def _step(self) -> StepInputs:
        assert self._current is not None, "attention outside a step"
        return self._current


def _itself(step: StepInputs) -> StepInputs:
    return step


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
