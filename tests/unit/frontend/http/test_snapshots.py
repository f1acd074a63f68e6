"""Many who ask for the state at once cost one question, and nobody is told an old state."""

from __future__ import annotations

import asyncio

import pytest
from fakes import FakeAttentionWorker

from cluster.errors import Unavailable
from cluster.frontend.http.snapshots import Snapshots


class Counting(FakeAttentionWorker):
    """Counts the questions, and answers none before `gate` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, int] = {}
        self.gate = asyncio.Event()

    async def worker_statuses(self):
        return await self._counted("workers", super().worker_statuses())

    async def host_statuses(self):
        return await self._counted("hosts", super().host_statuses())

    async def experts_reports(self):
        return await self._counted("experts", super().experts_reports())

    async def _counted(self, name, answer):
        self.asked[name] = self.asked.get(name, 0) + 1
        await self.gate.wait()
        return await answer


@pytest.mark.parametrize("max_age_s", [0.0, 60.0])
def test_fifty_scrapes_at_once_are_one_question_each(make_app, call, max_age_s):
    async def scenario():
        worker = Counting()
        app = make_app(worker, status_max_age_s=max_age_s)
        paths = ("/metrics", "/ready", "/status", "/experts", "/metrics")
        tasks = [asyncio.create_task(call(app, "GET", path)) for path in paths * 10]
        async with asyncio.timeout(10):
            while not worker.asked:
                await asyncio.sleep(0)
            for _ in range(200):
                await asyncio.sleep(0)
            worker.gate.set()
            answers = await asyncio.gather(*tasks)
        assert {answer.status_code for answer in answers} == {200}
        return worker

    asked = asyncio.run(scenario()).asked
    assert asked["workers"] <= 2  # /experts asks for itself, as its numbers must fit each other
    assert max(asked.values()) <= 4  # with an age of 0, those that come to their second question later ask again


def snapshots_and_clock(max_age_s=1.0, timeout_s=5.0):
    now = [100.0]
    return Snapshots(max_age_s, timeout_s=timeout_s, now_s=lambda: now[0]), now


def test_answer_is_as_old_as_allowed_and_no_older():
    async def scenario():
        snapshots, now = snapshots_and_clock()
        asked = []

        async def ask():
            asked.append(now[0])
            return now[0]

        assert await snapshots.get("a", ask) == 100.0
        now[0] = 100.9
        assert await snapshots.get("a", ask) == 100.0
        now[0] = 101.0
        assert await snapshots.get("a", ask) == 101.0
        snapshots.forget()
        now[0] = 101.1
        assert await snapshots.get("a", ask) == 101.1
        assert len(asked) == 3

    asyncio.run(scenario())


def test_age_counts_from_the_question():
    async def scenario():
        snapshots, now = snapshots_and_clock()

        async def ask_slowly():
            seen_s = now[0]
            now[0] += 2.0
            return seen_s

        assert await snapshots.get("a", ask_slowly) == 100.0
        assert await snapshots.get("a", ask_slowly) == 102.0

    asyncio.run(scenario())


def test_who_leaves_takes_nothing_from_the_others():
    async def scenario():
        snapshots, _ = snapshots_and_clock()
        gate = asyncio.Event()

        async def ask():
            await gate.wait()
            return "answer"

        first = asyncio.create_task(snapshots.get("a", ask))
        await asyncio.sleep(0)
        second = asyncio.create_task(snapshots.get("a", ask))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        gate.set()
        return await second

    assert asyncio.run(scenario()) == "answer"


def test_failure_is_shared_and_not_kept_for_longer():
    async def scenario():
        snapshots, now = snapshots_and_clock()
        asked = 0

        async def fail():
            nonlocal asked
            asked += 1
            raise Unavailable("gone")

        for _ in range(5):
            with pytest.raises(Unavailable):
                await snapshots.get("a", fail)
        assert asked == 1
        now[0] = 101.0

        async def answer():
            return 7

        assert await snapshots.get("a", answer) == 7

    asyncio.run(scenario())


def test_question_without_an_answer_ends():
    async def scenario():
        snapshots, _ = snapshots_and_clock(timeout_s=0.01)
        with pytest.raises(TimeoutError):
            await snapshots.get("a", asyncio.Event().wait)

    asyncio.run(scenario())
