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
from itertools import accumulate

import greenlet
import torch
from torch import Tensor

from actors.engine.batcher import ScheduledRows
from actors.engine.paged_kv import paged_kv
from actors.engine.signal_tap import SignalTap
from actors.engine.step import StepFailed, StepInputs, pack_rows, packed_order
from actors.engine.unsound import blame, is_sound, unsound_rows
from actors.experts.dispatch import Dispatcher
from actors.gates.work import ExpertWork
from actors.kernels.native import NativeKernels
from actors.model.checkpoint import LoadedModel
from actors.model.seams import PackedCache, bind, cache_argument
from cluster.errors import ExpertReadError, InvalidOutput, MoesaicError
from cluster.types import RequestId

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
        self.signals: SignalTap | None = None
        self.num_layers_run = 0  # MoE layers, of all steps: a sign of progress within a long step
        self._cache = {cache_argument(loaded.model): PackedCache(self)}
        self._current: StepInputs | None = None
        self._last: tuple[Seq[ScheduledRows], StepInputs, ExpertWork | None] | None = None
        bind(self.model, self)

    def execute(self, rows: Seq[ScheduledRows]) -> Tensor:
        """Compute the rows; logits [R, N] of the rows that need them, in order."""
        return self.execute_interleaved([rows])[0]

    def forget(self, request_id: RequestId) -> None:
        """A request is over: whatever is kept of it is freed."""
        if self.signals is not None:
            self.signals.forget(request_id)

    def execute_interleaved(self, micro_batches: Seq[Seq[ScheduledRows]]) -> list[Tensor]:
        """Compute several micro-batches, resuming each in turn at every MoE layer; logits of each.

        While the experts of one work elsewhere, the next one's attention is computed (ping-pong, MegaScale-Infer).

        Groundwork: hides the way to expert hosts where batches are bound by compute. Missing: the engine gives one
        micro-batch a step; nothing divides a step, nor says when to.
        """
        forwards = [(pack_rows(rows, self._buckets), greenlet.greenlet(self._forward)) for rows in micro_batches]
        signals = self.signals if len(forwards) == 1 else None  # signals are of one step at a time
        if signals is not None:
            signals.begin(micro_batches[0], forwards[0][0])
        asked: list[ExpertWork | None] = [None] * len(forwards)
        is_whole = False
        self._dispatcher.recorder.begin()
        try:
            logits = self._drive(forwards, signals, asked)
            self._last = (micro_batches[-1], forwards[-1][0], asked[-1])
            is_whole = True
            return logits
        except ExpertReadError as error:
            needs = [_who_needs(error, rows, work) for rows, work in zip(micro_batches, asked, strict=True)]
            raise StepFailed({request_id: error for ids in needs for request_id in ids}) from error
        except _Unsound as found:
            rows, step = micro_batches[found.forward], forwards[found.forward][0]
            raise StepFailed(self._blame(rows, step, asked[found.forward], found.work)) from None
        finally:  # of a step that broke off nothing counts: it will be computed again
            self._dispatcher.recorder.end(is_whole=is_whole)
            if signals is not None:
                signals.end(is_whole=is_whole)

    def explain(self, rows: ScheduledRows) -> InvalidOutput:
        """Why the logits of these rows are not finite: of the step that was computed last."""
        planned, step, work = self._last or ((), None, None)
        spans = _spans(planned)
        if step is None or rows.sequence.request.request_id not in spans:
            return InvalidOutput("the model's logits for this request are not finite (NaN or infinite)")
        self._dispatcher.recorder.begin()
        try:
            return self._blame_rows(spans[rows.sequence.request.request_id], step, work, None)
        finally:
            self._dispatcher.recorder.end(is_whole=False)

    def _blame(
        self, rows: Seq[ScheduledRows], step: StepInputs, before: ExpertWork | None, work: ExpertWork
    ) -> dict[RequestId, MoesaicError]:
        """Whose rows the gate of `work` saw not finite, and why."""
        bad_T = unsound_rows(work, step.num_rows)
        return {
            request_id: self._blame_rows(span, step, before, work.layer)
            for request_id, span in _spans(rows).items()
            if bad_T[span].any()
        }

    def _blame_rows(self, span: slice, step: StepInputs, before: ExpertWork | None, after: int | None) -> InvalidOutput:
        embeddings: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
        return blame(before, after, span, step.token_ids[0], embeddings, self._compute)

    def _compute(self, work: ExpertWork) -> Tensor:
        return self._dispatcher.start(work, len(work.hidden_TD), 0)()

    def _drive(
        self,
        forwards: list[tuple[StepInputs, greenlet.greenlet]],
        signals: SignalTap | None,
        asked: list[ExpertWork | None],
    ) -> list[Tensor]:
        """Args: asked: filled with the layer that each forward waits for."""
        results: list[Tensor | None] = [None] * len(forwards)
        fetch: list[Callable[[], object]] = [partial(_itself, step) for step, _ in forwards]
        active = list(range(len(forwards)))
        while active:
            for i in list(active):
                step, forward = forwards[i]
                answer = fetch[i]()
                self._current = step
                with _step_context(onednn=len(step.token_ids[0]) > self._native_rows):
                    passed = forward.switch(answer)
                if forward.dead:
                    results[i] = passed
                    active.remove(i)
                    continue
                self.num_layers_run += 1
                if not is_sound(passed, step.num_rows):
                    raise _Unsound(i, passed)
                asked[i] = passed
                if signals is not None:
                    signals.gate(passed, step.num_rows)
                fetch[i] = self._dispatcher.start(passed, step.num_rows, step.num_decode)
        return [logits for logits in results if logits is not None]

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        return self._kv[layer].attend(query, scale, self._step())

    def append_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._kv[layer].append(key, value, self._step().write_slots)

    def run_experts(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The suspension point: hands the work to whoever drives this forward."""
        driver = greenlet.getcurrent().parent
        assert driver is not None, "experts outside a driven forward"
        return driver.switch(ExpertWork(layer, hidden, topk_ids, topk_weights, self._step().clusters))

    def _forward(self, step: StepInputs) -> Tensor:
        # The whole model, not its decoder and head: some families scale or cap their logits.
        return self.model(
            input_ids=step.token_ids,
            position_ids=step.positions,
            use_cache=True,
            logits_to_keep=step.scored_rows,
            **self._cache,
        ).logits[0]

    def _step(self) -> StepInputs:
        assert self._current is not None, "attention outside a step"
        return self._current


class _Unsound(Exception):
    """The gate of `work` saw rows that are not finite."""

    def __init__(self, forward: int, work: ExpertWork) -> None:
        super().__init__(work.layer)
        self.forward, self.work = forward, work


def _spans(rows: Seq[ScheduledRows]) -> dict[RequestId, slice]:
    """Where the rows of each sequence are in a step."""
    ordered = packed_order(rows)
    stops = list(accumulate(item.num_rows for item in ordered))
    return {
        item.sequence.request.request_id: slice(stop - item.num_rows, stop)
        for item, stop in zip(ordered, stops, strict=True)
    }


def _who_needs(error: ExpertReadError, rows: Seq[ScheduledRows], work: ExpertWork | None) -> list[RequestId]:
    """The requests of a micro-batch whose rows chose the expert at the layer where it stopped; all if unknown."""
    spans = _spans(rows)
    if error.expert is None or work is None:
        return list(spans)
    layer, expert = error.expert
    if work.layer != layer:
        return []
    chose_T = (work.topk_ids_TK == expert).any(dim=1)
    return [request_id for request_id, span in spans.items() if chose_T[span].any()]


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
