"""The time that one request gives its sequences."""

from __future__ import annotations

import asyncio

import pytest
from fakes import FakeAttentionWorker

from cluster.errors import DeadlineExceeded
from cluster.frontend.generation.sequence import SamplingOptions


@pytest.mark.parametrize(
    ("configured_s", "given_s"), [(60.0, 0.02), (0.02, 60.0), (0.02, None)], ids=["given", "configured", "no other"]
)
def test_the_shorter_time_ends_all_choices(make_service, configured_s, given_s):
    worker = FakeAttentionWorker(pause_after=2)
    service = make_service(worker, request_timeout_s=configured_s)

    async def scenario():
        requests = await service.prepare_choices([5, 6], SamplingOptions(max_tokens=9, n=2), "answer")
        async with asyncio.timeout(10):
            async for _ in service.stream_choices(requests, timeout_s=given_s):
                pass

    with pytest.raises(DeadlineExceeded):
        asyncio.run(scenario())
    assert sorted(worker.closed) == sorted({*worker.aborted}) == ["answer-0", "answer-1"]
