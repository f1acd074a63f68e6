"""An attention worker's streams: a reader has every token, however slow it is and whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from engine_builders import CountingRunner, make_engine, make_request
from torch import Tensor

from actors.attention import worker as attention_worker
from actors.attention.worker import AttentionWorker
from actors.engine.batcher import ScheduledRows
from actors.gates.activation_recorder import ActivationRecorder
from cluster.config.load import load_config
from cluster.errors import MoesaicError, Unavailable
from cluster.model.info import load_model_info
from cluster.stats.memory_store import MemoryStore
from cluster.types import FinishReason, RequestId, StartupPhase, TokenChunk

DEADLINE_S = 20.0


class Gated(CountingRunner):
    """Counts upwards, a step at a time as `may_step` is released; then fails with `fault`, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.may_step = threading.Semaphore(0)
        self.fault: BaseException | None = None
        self.num_begun = 0

    def execute(self, rows: Sequence[ScheduledRows]) -> Tensor:
        self.num_begun += 1
        assert self.may_step.acquire(timeout=DEADLINE_S)
        if self.fault is not None:
            raise self.fault
        return super().execute(rows)


@pytest.fixture
def runner() -> Gated:
    return Gated()


@pytest.fixture
def worker(runner: Gated, monkeypatch: pytest.MonkeyPatch) -> Any:
    def build(*_: object, **__: object) -> Any:
        return SimpleNamespace(
            engine=make_engine(runner),
            recorder=ActivationRecorder((0,), 4, None),
            dispatcher=SimpleNamespace(close=lambda: None),
            lease=SimpleNamespace(close=lambda: None),
            backend=None,
            policy_runner=None,
            links=None,
        )

    monkeypatch.setattr(attention_worker, "build_engine", build)
    made = AttentionWorker(load_config(None, {}), load_model_info("moesaic-demo"), MemoryStore())
    ready = threading.Event()
    made.start(ready.set)
    assert ready.wait(DEADLINE_S)
    assert made.phase is StartupPhase.READY
    yield made
    runner.may_step.release(100)
    made.stop()


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(run())


async def _steps(worker: AttentionWorker, runner: Gated, num: int) -> None:
    """Let the engine do so many steps, and what it has to say arrive."""
    wanted = runner.num_begun + num  # the last of them: it waits already for the first
    runner.may_step.release(num)
    await _until_said(worker, lambda: runner.num_begun >= wanted)


async def _until_said(worker: AttentionWorker, has_begun: Callable[[], bool]) -> None:
    """Until the engine has begun what comes next, or has nothing to do: what it said before is in the loop's queue."""
    assert worker.parts is not None
    looked = threading.Event()
    worker.parts.engine.set_knowledge = lambda _: looked.set()  # type: ignore[method-assign]
    worker.set_knowledge(None)  # type: ignore[arg-type]
    while not has_begun():
        if looked.is_set() and not worker.parts.engine.has_work:
            break
        await asyncio.sleep(0)
    looked.clear()
    if not has_begun():
        worker.set_knowledge(None)  # type: ignore[arg-type]
        while not looked.is_set():
            await asyncio.sleep(0)
    await asyncio.sleep(0)


async def _read_slowly(worker: AttentionWorker, runner: Gated, steps: Sequence[int]) -> list[TokenChunk]:
    """Chunks of a request for 6 tokens; while the reader has one, the engine does so many steps."""
    chunks: list[TokenChunk] = []
    left = list(steps)
    runner.may_step.release(1)
    async for chunk in worker.generate(make_request("a", prompt=(4,), max_tokens=6)):
        chunks.append(chunk)
        if left:
            await _steps(worker, runner, left.pop(0))
    return chunks


@pytest.mark.parametrize("steps", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1), (4, 1)], ids=str)
def test_a_reader_that_waits_between_chunks_has_all_tokens_and_the_end(
    worker: AttentionWorker, runner: Gated, steps: tuple[int, ...]
) -> None:
    async def test() -> None:
        chunks = await _read_slowly(worker, runner, steps)

        assert [token for chunk in chunks for token in chunk.token_ids] == [5, 6, 7, 8, 9, 10]
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert worker.num_open == 0

    _run(test)


def test_tokens_that_came_before_an_error_come_before_it(worker: AttentionWorker, runner: Gated) -> None:
    async def test() -> None:
        tokens: list[int] = []
        runner.may_step.release(1)
        with pytest.raises(MoesaicError, match="a bug"):
            async for chunk in worker.generate(make_request("a", prompt=(4,), max_tokens=6)):
                tokens += chunk.token_ids
                if len(tokens) == 1:
                    await _steps(worker, runner, 2)
                    runner.fault = RuntimeError("a bug")
                    await _steps(worker, runner, 1)
        assert tokens == [5, 6, 7]

    _run(test)


def test_tokens_that_came_before_an_abort_come_with_it(worker: AttentionWorker, runner: Gated) -> None:
    async def test() -> None:
        chunks: list[TokenChunk] = []
        runner.may_step.release(1)
        async for chunk in worker.generate(make_request("a", prompt=(4,), max_tokens=6)):
            chunks.append(chunk)
            if len(chunks) == 1:
                await _steps(worker, runner, 2)
                await worker.abort(RequestId("a"))
        assert [chunk.token_ids for chunk in chunks] == [(5,), (6, 7)]
        assert chunks[-1].finish_reason is FinishReason.ABORT

    _run(test)


def test_a_command_that_fails_costs_its_own_request_and_not_the_engine(
    worker: AttentionWorker, runner: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        assert worker.parts is not None
        engine = worker.parts.engine
        runner.may_step.release(10)

        def broken(*_: object) -> None:
            raise IndexError("of another size")

        with monkeypatch.context() as patched:
            patched.setattr(engine, "set_knowledge", broken)
            patched.setattr(engine, "add", broken)
            worker.set_knowledge(None)  # type: ignore[arg-type]
            with pytest.raises(MoesaicError, match="of another size"):
                _ = [chunk async for chunk in worker.generate(make_request("a"))]
        chunks = [chunk async for chunk in worker.generate(make_request("b", prompt=(4,), max_tokens=1))]
        assert chunks[-1].token_ids == (5,)

    _run(test)


def test_a_step_that_nobody_can_be_blamed_for_can_be_tried_again(
    worker: AttentionWorker, runner: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        assert worker.parts is not None
        engine = worker.parts.engine
        with monkeypatch.context() as patched:
            patched.setattr(engine.batcher, "plan", lambda: [][1])
            with pytest.raises(Unavailable, match="try again"):
                _ = [chunk async for chunk in worker.generate(make_request("a"))]
        runner.may_step.release(10)
        chunks = [chunk async for chunk in worker.generate(make_request("b", prompt=(4,), max_tokens=1))]
        assert chunks[-1].token_ids == (5,)

    _run(test)
