"""Keep-alive, leaving clients, errors, draining and probes of the HTTP application over a scripted worker."""

from __future__ import annotations

import asyncio
import json

import pytest
from fakes import AsgiCall, FakeAttentionWorker

from cluster.errors import ConfigError, InvalidOutput, InvalidRequest, NothingToChange, Overloaded, Unavailable
from cluster.types import StartupPhase

CHAT = {"model": "moesaic-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
STREAM = CHAT | {"stream": True}
PATH = "/v1/chat/completions"


def events_of(text):
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_keep_alive_while_no_token_comes(make_app):
    worker = FakeAttentionWorker(pause_after=2)

    async def scenario():
        call = AsgiCall(make_app(worker, keep_alive_s=0.02), PATH, STREAM)
        task = asyncio.create_task(call.run())
        await worker.paused.wait()
        await asyncio.sleep(0.08)
        worker.resume.set()
        await task
        return call.text

    text = asyncio.run(scenario())
    assert text.count(": keep-alive\n\n") >= 2
    assert text.endswith("data: [DONE]\n\n")


def test_keep_alive_before_the_first_token(make_app):
    worker = FakeAttentionWorker(pause_after=0, fail_with=Unavailable("gone"), fail_after=1)

    async def scenario():
        call = AsgiCall(make_app(worker, keep_alive_s=0.02), PATH, STREAM)
        task = asyncio.create_task(call.run())
        await worker.paused.wait()
        await asyncio.sleep(0.05)
        worker.resume.set()
        await task
        return call

    call = asyncio.run(scenario())
    assert call.status == 200
    assert call.text.startswith(": keep-alive")
    assert events_of(call.text)[-1]["error"]["message"] == "gone"


@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize("pause_after", [0, 2])
def test_leaving_client_aborts_the_sequence(make_app, body, pause_after):
    worker = FakeAttentionWorker(pause_after=pause_after)

    async def scenario():
        app = make_app(worker)
        call = AsgiCall(app, PATH, body)
        task = asyncio.create_task(call.run())
        await worker.paused.wait()
        assert app.state.requests.num_in_flight == 1
        call.leave.set()
        await asyncio.wait_for(task, 2)
        assert app.state.requests.num_in_flight == 0

    asyncio.run(scenario())
    assert worker.aborted == worker.closed == [worker.requests[0].request_id]


@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_cancelled_request_aborts_the_sequence(make_app, body):
    worker = FakeAttentionWorker(pause_after=1)

    async def scenario():
        task = asyncio.create_task(AsgiCall(make_app(worker), PATH, body).run())
        await worker.paused.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert worker.aborted == worker.closed == [worker.requests[0].request_id]


def test_leaving_client_aborts_all_choices(make_app):
    worker = FakeAttentionWorker(pause_after=1)

    async def scenario():
        body = {"model": "moesaic-demo", "prompt": ["a", "b", "c"], "stream": True}
        call = AsgiCall(make_app(worker), "/v1/completions", body)
        task = asyncio.create_task(call.run())
        await worker.paused.wait()
        call.leave.set()
        await asyncio.wait_for(task, 2)

    asyncio.run(scenario())
    assert sorted(worker.aborted) == sorted(request.request_id for request in worker.requests)


@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize(("error", "status"), [(Overloaded("queue full"), 429), (Unavailable("starting"), 503)])
def test_refusal_before_the_first_token_has_a_status(make_app, call, metrics, body, error, status):
    async def scenario():
        return await call(make_app(FakeAttentionWorker(fail_with=error)), "POST", PATH, json=body)

    response = asyncio.run(scenario())
    assert response.status_code == status
    assert int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["message"] == error.message
    assert "moesaic_admission_rejections_total" in metrics.text()


def test_error_within_a_stream_is_its_last_event(make_app, call):
    async def scenario():
        worker = FakeAttentionWorker(fail_with=Unavailable("worker lost"), fail_after=2)
        return await call(make_app(worker), "POST", PATH, json=STREAM)

    response = asyncio.run(scenario())
    assert response.status_code == 200
    assert events_of(response.text)[-1]["error"]["message"] == "worker lost"
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_output_that_is_not_finite_is_a_422_that_nobody_is_to_try_again(make_app, call, body):
    error = InvalidOutput("not finite from expert 3 of layer 1 on")

    async def scenario():
        return await call(make_app(FakeAttentionWorker(fail_with=error)), "POST", PATH, json=body)

    response = asyncio.run(scenario())
    assert response.status_code == 422
    assert "retry-after" not in response.headers
    assert response.json()["error"] == {
        "message": error.message,
        "type": "invalid_output_error",
        "param": None,
        "code": "invalid_output",
    }


def test_output_that_becomes_not_finite_within_a_stream_is_its_last_event(make_app, call):
    async def scenario():
        worker = FakeAttentionWorker(fail_with=InvalidOutput("not finite"), fail_after=2)
        return await call(make_app(worker), "POST", PATH, json=STREAM)

    response = asyncio.run(scenario())
    assert events_of(response.text)[-1]["error"]["code"] == "invalid_output"
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_bug_is_a_500_that_tells_nothing(make_app, call, body):
    async def scenario():
        return await call(make_app(FakeAttentionWorker(fail_with=RuntimeError("secret"))), "POST", PATH, json=body)

    response = asyncio.run(scenario())
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


def test_deadline(make_app, call):
    worker = FakeAttentionWorker(pause_after=1)

    async def scenario():
        return await call(make_app(worker, request_timeout_s=0.05), "POST", PATH, json=CHAT)

    response = asyncio.run(scenario())
    assert response.status_code == 504
    assert worker.aborted == [worker.requests[0].request_id]


def test_draining_lets_open_requests_finish(make_app, call):
    worker = FakeAttentionWorker(pause_after=1)

    async def scenario():
        app = make_app(worker)
        open_call = AsgiCall(app, PATH, STREAM)
        task = asyncio.create_task(open_call.run())
        await worker.paused.wait()
        app.state.requests.begin_drain()
        refused = await call(app, "POST", PATH, json=CHAT)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        ready = await call(app, "GET", "/ready")
        assert (ready.status_code, ready.json()["phase"]) == (503, "draining")
        assert not await app.state.requests.wait_idle(0.01)
        worker.resume.set()
        assert await app.state.requests.wait_idle(2)
        await task
        assert open_call.text.endswith("data: [DONE]\n\n")
        assert (await call(app, "GET", "/health")).status_code == 200

    asyncio.run(scenario())


def test_ready_tells_the_phase(make_app, call):
    worker = FakeAttentionWorker()

    async def scenario():
        app = make_app(worker)
        assert (await call(app, "GET", "/ready")).status_code == 200
        worker.phase = StartupPhase.LOADING
        loading = await call(app, "GET", "/ready")
        assert (loading.status_code, loading.json()["phase"]) == (503, "loading dense weights")
        assert "retry-after" in loading.headers
        worker.phase = StartupPhase.FAILED
        assert (await call(app, "GET", "/ready")).json()["error"] == "shard 2 is truncated"
        worker.status_error = ConnectionError("gone")
        lost = await call(app, "GET", "/ready")
        assert (lost.status_code, lost.json()["phase"]) == (503, "failed")
        assert (await call(app, "GET", "/status")).status_code == 503
        assert (await call(app, "GET", "/health")).status_code == 200

    asyncio.run(scenario())


def test_operator_routes(make_app, call):
    async def scenario():
        app = make_app()
        await call(app, "POST", PATH, json=CHAT)
        await call(app, "GET", "/nothing")
        page = (await call(app, "GET", "/experts")).json()
        counts = {"prefill": [2, 6], "decode": [0, 0]}
        assert page["cluster"] == {"layers": [{"layer": 0, "activations": counts}], "degraded": None}
        experts = page["workers"][0]
        assert experts["memory"]["budget_bytes"] == 10
        assert experts["memory"]["misses_by_tier"] == {"ram": 3, "remote": 0, "disk": 2}
        assert [tier["tier"] for tier in experts["memory"]["tiers"]] == ["device", "ram", "disk"]
        assert experts["memory"]["calibration"][1] == {"predicted": 0.75, "observed": 0.5, "count": 4}
        assert experts["layers"][0]["ram_resident"] == [0, 1]
        assert experts["layers"][0]["misses_by_tier"] == {"ram": 1, "remote": 0, "disk": 0}
        assert experts["layers"][0]["activations"] == {"prefill": [2, 3], "decode": [0, 0]}
        status = (await call(app, "GET", "/status")).json()
        assert status["workers"][0]["phase"] == "ready"
        assert (status["draining"], status["num_in_flight"]) == (False, 0)
        assert "version" in (await call(app, "GET", "/version")).json()
        return await call(app, "GET", "/metrics")

    response = asyncio.run(scenario())
    for line in (
        'moesaic_request_success_total{finished_reason="length"} 1.0',
        "moesaic_generation_tokens_total 4.0",
        'moesaic_expert_load_ratio{layer="0",phase="prefill"} 1.5',
        "moesaic_time_to_first_token_seconds_count 1.0",
        "moesaic_inter_token_latency_seconds_count 3.0",
        'moesaic_http_requests_total{code="200",route="/v1/chat/completions"} 1.0',
        'moesaic_http_requests_total{code="404",route="other"} 1.0',
        "moesaic_num_requests_in_flight 0.0",
        'moesaic_num_requests_running{process="worker-w0"} 0.0',
    ):
        assert line in response.text
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_request_id_is_echoed_or_made(make_app, call):
    async def scenario():
        app = make_app()
        echoed = await call(app, "GET", "/health", headers={"x-request-id": "abc-1"})
        made = await call(app, "GET", "/v1/unknown", headers={"x-request-id": "x" * 500})
        return echoed.headers["x-request-id"], made.headers["x-request-id"]

    echoed, made = asyncio.run(scenario())
    assert echoed == "abc-1"
    assert len(made) == 32 and made.isalnum()


def test_answer_before_routing_is_counted_by_its_path(make_app, call, metrics):
    asyncio.run(call(make_app(max_body_bytes=1024), "POST", PATH, content=b"x" * 2000))
    assert 'moesaic_http_requests_total{code="413",route="/v1/chat/completions"} 1.0' in metrics.text()


def test_first_error_of_several_choices_ends_all(make_app, call):
    worker = FakeAttentionWorker(fail_with=Overloaded("queue full"), fail_after=1)

    async def scenario():
        body = {"model": "moesaic-demo", "prompt": ["a", "b"]}
        return await call(make_app(worker), "POST", "/v1/completions", json=body)

    assert asyncio.run(scenario()).status_code == 429
    assert sorted(worker.closed) == sorted(request.request_id for request in worker.requests)


@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (InvalidRequest("200% is more than there is", param="cache"), 400, False),
        (ConfigError("holds 1 expert"), 400, False),
        (NothingToChange("hosts have the experts"), 409, False),
        (Unavailable("starting"), 503, True),
    ],
)
def test_a_cache_that_cannot_be_changed_says_whether_to_try_again(make_app, call, error, status, retryable):
    worker = FakeAttentionWorker()
    worker.cache_error = error

    async def scenario():
        answer = await call(make_app(worker), "POST", "/experts/cache", json={"cache": "200%"})
        assert answer.status_code == status
        assert ("retry-after" in answer.headers) is retryable
        assert answer.json()["error"]["message"] == error.message

    asyncio.run(scenario())
