"""What probes and pages say of workers whose steps all fail."""

from __future__ import annotations

import asyncio
from typing import Any

from fakes import FakeAttentionWorker

from actors.engine.failed_steps import FAILING_AFTER, FailedSteps
from cluster.errors import MoesaicError
from cluster.frontend.http.operator_routes import readiness
from cluster.types import StartupPhase

BROKEN = MoesaicError("asked for only where it is")


def failed(*, times: int) -> FailedSteps:
    steps = FailedSteps()
    for _ in range(times):
        steps.note(0, [BROKEN])
    return steps


def test_health_readiness_and_status_tell_of_failed_steps(make_app: Any, call: Any) -> None:
    worker = FakeAttentionWorker()

    async def scenario() -> None:
        app = make_app(worker)
        worker.failed_steps = failed(times=1)
        health = await call(app, "GET", "/health")
        assert (health.status_code, health.json()["failed_steps"]) == (200, 1)
        assert (await call(app, "GET", "/ready")).status_code == 200
        assert (await call(app, "GET", "/status")).json()["workers"][0]["degraded"]

        worker.failed_steps = failed(times=FAILING_AFTER)
        health = await call(app, "GET", "/health")
        assert (health.status_code, health.json()["status"]) == (503, "failing")
        assert "retry-after" in health.headers and BROKEN.message in health.json()["reasons"][0]
        ready = await call(app, "GET", "/ready")
        assert (ready.status_code, ready.json()["phase"]) == (503, "failed") and BROKEN.message in ready.json()["error"]
        assert (
            f'moesaic_failed_steps{{process="worker-w0"}} {FAILING_AFTER}.0'
            in (await call(app, "GET", "/metrics")).text
        )

    asyncio.run(scenario())


def test_one_worker_that_answers_is_enough_to_be_ready() -> None:
    sick, well = FakeAttentionWorker(), FakeAttentionWorker()
    sick.failed_steps = failed(times=FAILING_AFTER)

    assert readiness((sick._status(), well._status())) == (StartupPhase.READY, None)
    assert readiness((sick._status(),))[0] is StartupPhase.FAILED
