"""Requests, sequences and a runner without a model, for tests of the engine's decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actors.engine.batcher import Batcher, ScheduledRows
from actors.engine.engine import Engine
from actors.engine.kv_blocks import KvBlocks
from cluster.errors import InvalidOutput
from cluster.types import GenerationRequest, RequestId, SamplingParams

VOCABULARY = 32


def make_request(
    name: str = "r", *, prompt: Sequence[int] = (1, 2, 3), choice: int = 0, max_tokens: int = 8, **sampling: Any
) -> GenerationRequest:
    """A greedy request unless `sampling` says otherwise."""
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": max_tokens} | sampling))
    return GenerationRequest(request_id=RequestId(name), prompt_ids=tuple(prompt), sampling=params, choice=choice)


def make_batcher(
    *, num_blocks: int = 64, block_size: int = 4, max_batch_tokens: int = 64, max_running: int = 8, max_queue: int = 100
) -> Batcher:
    """Args: num_blocks: usable ones (block 0 comes on top)."""
    blocks = KvBlocks(num_blocks + 1, block_size)
    return Batcher(blocks, max_batch_tokens=max_batch_tokens, max_running=max_running, max_queue=max_queue)


class CountingRunner:
    """Stands in for ModelRunner: the likeliest token is `choose(tokens of the sequence)`; remembers its steps."""

    def __init__(self, choose: Callable[[Sequence[int]], int] = lambda tokens: (tokens[-1] + 1) % VOCABULARY) -> None:
        self.choose = choose
        self.steps: list[list[tuple[str, int]]] = []
        self.forgotten: list[RequestId] = []

    def execute(self, rows: Sequence[ScheduledRows]) -> Tensor:
        self.steps.append([(r.sequence.request.request_id, r.num_rows) for r in rows])
        logits = torch.zeros(sum(r.num_logits for r in rows), VOCABULARY)
        ends = [r.sequence.computed + r.num_rows - back for r in rows for back in reversed(range(r.num_logits))]
        owners = [r.sequence for r in rows for _ in range(r.num_logits)]
        for row, (sequence, end) in enumerate(zip(owners, ends, strict=True)):
            logits[row] = torch.arange(VOCABULARY, 0, -1) / VOCABULARY
            logits[row, self.choose(sequence.tokens[:end])] = 10.0
        return logits

    def explain(self, rows: ScheduledRows) -> InvalidOutput:
        return InvalidOutput(f"not finite: {rows.sequence.request.request_id}")

    def forget(self, request_id: RequestId) -> None:
        self.forgotten.append(request_id)


def make_engine(
    runner: CountingRunner | None = None, *, eos: Sequence[int] = (0,), max_model_len: int = 64, **batcher: Any
) -> Engine:
    """An engine around a runner that counts upwards."""
    engine_runner: Any = runner or CountingRunner()
    return Engine(engine_runner, make_batcher(**batcher), max_model_len=max_model_len, eos_token_ids=eos)
