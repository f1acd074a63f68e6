"""Records gate traces of an engine in this process.

Knows the order in which a step packs its rows; knows nothing of files or prompts' text.

Shapes: as in cluster/policies/trace.py; T packed rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from actors.engine.batcher import ScheduledRows
from actors.engine.step import packed_order
from actors.gates.reader import gate_readers
from cluster.errors import InvalidOutput
from cluster.policies.trace import GateTrace, TracedModel, TracedRequest
from cluster.types import GenerationRequest, RequestId, SamplingParams

if TYPE_CHECKING:
    from actors.engine.loaded_engine import LoadedEngine
    from actors.engine.model_runner import ModelRunner
    from cluster.model.info import ModelInfo


@dataclass(frozen=True, slots=True)
class GateRows:
    """One forward: probs [T, L, E] and ahead [T, L - 1, E] float16, chosen [T, L, K] uint16; see GateTrace."""

    probs: np.ndarray
    chosen: np.ndarray
    ahead: np.ndarray


class RowTap:
    """Hooks on every gate of a model, which keep what its reader says of each row; a context manager."""

    def __init__(self, model: nn.Module) -> None:
        """Raises: CheckpointError: an experts module without a gate beside it."""
        self._readers = gate_readers(model)
        self.layers = tuple(self._readers)
        self._handles: list[RemovableHandle] = []
        self._said: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # probabilities, choices, ahead

    def __enter__(self) -> Self:
        for layer, reader in self._readers.items():
            self._handles.append(reader.gate.register_forward_hook(partial(self._on_gate, layer)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._said.clear()

    def take(self, num_rows: int) -> GateRows:
        """What the last forward gave for its first `num_rows` rows; the others are padding."""
        assert len(self._said) == len(self.layers), "take() follows a whole forward"
        said = [self._said[layer] for layer in self.layers]
        probs = _half([each[0][:num_rows] for each in said])
        chosen = torch.stack([each[1][:num_rows] for each in said], dim=1).cpu().numpy().astype(np.uint16)
        ahead = [torch.zeros_like(each[0]) if each[2] is None else each[2] for each in said[:-1]]
        self._said.clear()
        return GateRows(probs, chosen, _half([each[:num_rows] for each in ahead]) if ahead else probs[:, :0])

    def _on_gate(self, layer: int, _module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        logits, _weights, indices = output
        probs, ahead = self._readers[layer].rows(logits, inputs[0])
        self._said[layer] = probs, indices, ahead


@dataclass(slots=True)
class _Recording:
    """One request's rows so far, a step an entry."""

    tokens: list[list[int]] = field(default_factory=list)
    positions: list[range] = field(default_factory=list)
    phases: list[bool] = field(default_factory=list)
    gates: list[GateRows] = field(default_factory=list)


class TracingRunner:
    """Stands in for an engine's runner: computes the same, and keeps what the gates said of every row."""

    def __init__(self, runner: ModelRunner, tap: RowTap) -> None:
        self.model = runner.model
        self._runner = runner
        self._tap = tap
        self.recordings: dict[RequestId, _Recording] = {}

    def execute(self, rows: Sequence[ScheduledRows]) -> Tensor:
        """Compute the rows; logits of those that need them."""
        logits = self._runner.execute(rows)
        gates = self._tap.take(sum(item.num_rows for item in rows))
        start = 0
        for item in packed_order(rows):
            sequence, stop = item.sequence, start + item.num_rows
            recording = self.recordings.setdefault(sequence.request.request_id, _Recording())
            first, last = sequence.computed, sequence.computed + item.num_rows
            recording.tokens.append(sequence.tokens[first:last])
            recording.positions.append(range(first, last))
            recording.phases.append(first >= len(sequence.request.prompt_ids))
            of_item = slice(start, stop)
            recording.gates.append(GateRows(gates.probs[of_item], gates.chosen[of_item], gates.ahead[of_item]))
            start = stop
        return logits

    def explain(self, rows: ScheduledRows) -> InvalidOutput:
        """What ModelRunner.explain says."""
        return self._runner.explain(rows)

    def forget(self, request_id: RequestId) -> None:
        """Recordings outlive their requests."""


def record_trace(
    parts: LoadedEngine,
    info: ModelInfo,
    requests: Sequence[TracedRequest],
    sampling: SamplingParams,
    *,
    num_running: int = 8,
    on_done: Callable[[int], None] = lambda _: None,
) -> GateTrace:
    """Generate for every request and keep all rows, prompts included.

    Request i draws with seed `sampling.seed` + i. What the KV cache already knows of a prompt is not computed again
    and has no rows.

    Args:
        num_running: requests computed together; each keeps its own rows.
        on_done: called with the number of requests that have ended.

    Raises:
        MoesaicError: a request could not be computed: of a trace with a hole nobody knows what is missing.
    """
    engine = parts.engine
    runner = engine.runner
    with RowTap(runner.model) as tap:
        tracing = TracingRunner(runner, tap)
        engine.runner = tracing  # type: ignore[assignment]
        try:
            started = done = 0
            while done < len(requests):
                while started < len(requests) and started - done < num_running:
                    request = requests[started]
                    own = replace(sampling, seed=sampling.seed + started)
                    name = RequestId(str(started))
                    engine.add(GenerationRequest(request_id=name, prompt_ids=request.prompt_ids, sampling=own))
                    started += 1
                outputs = engine.step()
                for error in (output.error for output in outputs if output.error is not None):
                    raise error
                ended = sum(output.finish_reason is not None for output in outputs)
                done += ended
                if ended:
                    on_done(done)
        finally:
            engine.runner = runner
            engine.abort_all()
        layers = tap.layers
    store = parts.store
    model = TracedModel(
        name=info.name,
        fingerprint=info.fingerprint,
        layers=layers,
        num_experts=store.layout.num_experts,
        top_k=int(next(iter(tracing.recordings.values())).gates[0].chosen.shape[2]) if requests else 0,
        expert_bytes=store.slot_bytes,
    )
    return _assemble(model, requests, [tracing.recordings[RequestId(str(i))] for i in range(len(requests))], runner)


def _assemble(
    model: TracedModel, requests: Sequence[TracedRequest], recordings: Sequence[_Recording], runner: ModelRunner
) -> GateTrace:
    lengths = [[len(tokens) for tokens in r.tokens] for r in recordings]
    tokens = np.array([t for r in recordings for step in r.tokens for t in step], dtype=np.int32)
    vocab = np.unique(tokens)
    table = runner.model.get_input_embeddings().weight  # type: ignore[union-attr]
    gates = [g for r in recordings for g in r.gates]
    flat_lengths = [n for steps in lengths for n in steps]
    phases = [phase for r in recordings for phase in r.phases]
    steps = [index for of_request in lengths for index in range(len(of_request))]
    return GateTrace(
        model=model,
        requests=tuple(requests),
        row_starts=np.cumsum([0, *(sum(steps) for steps in lengths)]).astype(np.int64),
        tokens=tokens,
        positions=np.array([p for r in recordings for step in r.positions for p in step], dtype=np.int32),
        steps=np.repeat(np.array(steps, dtype=np.int32), flat_lengths),
        is_decode=np.repeat(np.array(phases, dtype=bool), flat_lengths),
        probs=np.concatenate([g.probs for g in gates]),
        chosen=np.concatenate([g.chosen for g in gates]),
        ahead=np.concatenate([g.ahead for g in gates]),
        vocab=vocab,
        embeddings=table[vocab.tolist()].detach().float().cpu().numpy().astype(np.float16),  # type: ignore[index]
    )


def _half(layers: Sequence[Tensor]) -> np.ndarray:
    """[T, L, E] of layers [T, E]."""
    return torch.stack(tuple(layers), dim=1).to(torch.float16).cpu().numpy()
