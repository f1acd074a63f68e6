"""A client that goes away takes its sequence with it."""

from __future__ import annotations

import time

import openai
import pytest
from live_server import LiveServer, poll

pytestmark = pytest.mark.ray

LONG = 1500  # tokens; more than 15 s of work


def test_closed_stream_stops_its_sequence(server: LiveServer, client: openai.OpenAI) -> None:
    before = server.worker()["generated_tokens"]
    stream = client.completions.create(
        model="moesaic-demo", prompt="Once upon a time", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    assert server.worker()["num_running"] == 1

    stream.close()
    closed_s = time.monotonic()
    poll(lambda: server.worker()["num_running"] == 0, deadline_s=3, what="the sequence stops", every_s=0.05)

    assert time.monotonic() - closed_s < 3
    assert server.worker()["kv_blocks_used"] == 0
    assert server.worker()["generated_tokens"] - before < LONG // 2
    poll(lambda: server.get("/status")["num_in_flight"] == 0, deadline_s=3, what="nothing in flight")


def test_client_that_does_not_stream_may_leave_too(server: LiveServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model="moesaic-demo", prompt="It was", max_tokens=LONG, extra_body={"ignore_eos": True}, timeout=1.0
        )

    poll(lambda: server.worker()["num_running"] == 0, deadline_s=3, what="the sequence stops", every_s=0.05)
