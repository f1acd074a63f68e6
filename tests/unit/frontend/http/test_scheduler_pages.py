"""Pages of the scheduler: its values as JSON, and 503 while it is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fakes import FakeAttentionWorker
from fastapi import FastAPI

from cluster.config.sections import FrontendConfig
from cluster.errors import InvalidRequest, Unavailable
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.http.app import create_app
from cluster.model.info import ModelInfo
from cluster.observability.metrics import FrontendMetrics
from cluster.placement.plan import Move, MoveKind, Placement, PlacementPlan
from cluster.status.diagnosis import Diagnosis
from cluster.status.scheduler import (
    DrainLine,
    HostLine,
    KnowledgeLine,
    PlacementLine,
    SchedulerStatus,
    WorkerLine,
)
from cluster.types import ExpertId, StartupPhase

Call = Callable[..., Awaitable[httpx.Response]]


def _worker(worker_id: str, num_running: int) -> WorkerLine:
    return WorkerLine(
        worker_id=worker_id,
        replica_id="r",
        node_id="n",
        phase=StartupPhase.READY,
        age_s=0.5,
        is_draining=False,
        num_running=num_running,
        num_waiting=0,
        waiting_tokens=0,
        steps=1,
        step_s=0.1,
        stalled_s=0.0,
        resident=2,
        knowledge_version=3,
        placement_epoch=1,
    )


HOST = HostLine(
    host_id="host-0-a",
    index=0,
    node_id="n",
    phase=StartupPhase.READY,
    age_s=0.25,
    is_draining=False,
    owned=4,
    resident=4,
    capacity=8,
    epochs=(1,),
    busy_s=1.0,
)
STATUS = SchedulerStatus(
    uptime_s=5.0,
    routing="semantic",
    placement_mode="auto",
    workers=(_worker("w0", 3), _worker("w1", 1)),
    hosts=(HOST,),
    knowledge=KnowledgeLine(
        version=3, clusters_version=1, num_clusters=16, age_s=2.0, mutual_information=0.25, support=9.0
    ),
    placement=PlacementLine(epoch=4, num_plans=3, num_migrations=2, bytes_moved=1000, balance=1.25),
)
MOVE = Move(
    kind=MoveKind.MOVE,
    expert=ExpertId(3, 7),
    source=0,
    target=1,
    from_tier=None,
    to_tier=None,
    num_bytes=100,
    gain_s=0.5,
    reason="host 0 is busier",
)
PLAN = PlacementPlan(
    placement=Placement(epoch=5, hosts={0: {3: (1,)}, 1: {3: (7,)}}),
    moves=(MOVE,),
    applies=True,
    reason="1 change levels the hosts",
    balance_now=1.5,
    balance_then=1.0,
    gain_s=9.0,
    cost_s=1.0,
)


class _Scheduler:
    """Answers, or is away."""

    def __init__(self) -> None:
        self.is_away = False
        self.asked: list[tuple[str, str]] = []

    async def status(self) -> SchedulerStatus:
        if self.is_away:
            raise Unavailable("there is no scheduler")
        return STATUS

    async def plan(self) -> PlacementPlan:
        return PLAN

    async def diagnose(self) -> Diagnosis:
        return Diagnosis(scored=False, phases=(), semantic=None, advice=("leave it off",))

    async def drain(self, node: str) -> DrainLine:
        self.asked.append(("drain", node))
        if node == "nowhere":
            raise InvalidRequest("no nodes are called 'nowhere'", param="node")
        return DrainLine(node_id="n", is_empty=False, left=("expert host 0: 4 experts",))

    async def undrain(self, node: str) -> DrainLine:
        self.asked.append(("undrain", node))
        return DrainLine(node_id="n", is_empty=True)


def _app(
    make_service: Callable[..., GenerationService],
    info: ModelInfo,
    metrics: FrontendMetrics,
    scheduler: _Scheduler | None,
    **config: Any,
) -> FastAPI:
    worker = FakeAttentionWorker()
    return create_app(make_service(worker), worker, info, FrontendConfig(**config), metrics, scheduler=scheduler)


def test_pages_show_what_the_scheduler_says(
    make_service: Callable[..., GenerationService], info: ModelInfo, metrics: FrontendMetrics, call: Call
) -> None:
    scheduler = _Scheduler()
    app = _app(make_service, info, metrics, scheduler)

    async def scenario() -> list[httpx.Response]:
        pages = [await call(app, "GET", path) for path in ("/scheduler", "/plan", "/diagnose", "/metrics")]
        for body in ({"node": "n"}, {"node": "n", "undo": True}, {"node": "nowhere"}, {"nodes": "n"}):
            pages.append(await call(app, "POST", "/drain", json=body))
        return pages

    status, plan, diagnosis, metrics_page, drained, undone, unknown, misspelt = asyncio.run(scenario())

    assert status.json()["workers"][0]["num_running"] == 3
    assert status.json()["knowledge"]["mutual_information"] == 0.25
    assert (plan.json()["bytes"], plan.json()["moves"][0]["reason"]) == (100, "host 0 is busier")
    assert plan.json()["hosts"] == {"0": {"3": [1]}, "1": {"3": [7]}}
    assert diagnosis.json()["advice"] == ["leave it off"]
    for sample in (
        "moesaic_scheduler_up 1.0",
        "moesaic_worker_load_ratio 1.5",
        "moesaic_prompt_expert_information_bits 0.25",
        "moesaic_expert_balancedness 0.8",
        "moesaic_expert_rebalance_total 2.0",
        "moesaic_expert_rebalance_bytes_total 1000.0",
        'moesaic_report_age_seconds{process="host-0-a"} 0.25',
    ):
        assert sample in metrics_page.text.splitlines()
    assert drained.json() == {"node_id": "n", "is_empty": False, "left": ["expert host 0: 4 experts"]}
    assert undone.json()["is_empty"]
    assert scheduler.asked == [("drain", "n"), ("undrain", "n"), ("drain", "nowhere")]
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "node")
    assert misspelt.status_code == 400


def test_a_scheduler_that_is_away_or_not_there_is_503_and_metrics_say_so(
    make_service: Callable[..., GenerationService], info: ModelInfo, metrics: FrontendMetrics, call: Call
) -> None:
    scheduler = _Scheduler()
    scheduler.is_away = True
    away = _app(make_service, info, metrics, scheduler)
    alone = _app(make_service, info, metrics, None)

    async def scenario() -> list[httpx.Response]:
        return [
            await call(away, "GET", "/scheduler"),
            await call(alone, "GET", "/plan"),
            await call(away, "GET", "/metrics"),
            await call(alone, "GET", "/metrics"),
        ]

    page, plan, away_metrics, own_metrics = asyncio.run(scenario())

    assert (page.status_code, plan.status_code) == (503, 503)
    assert "moesaic_scheduler_up 0.0" in away_metrics.text
    assert "moesaic_scheduler" not in own_metrics.text


def test_pages_of_the_scheduler_need_the_key(
    make_service: Callable[..., GenerationService], info: ModelInfo, metrics: FrontendMetrics, call: Call
) -> None:
    app = _app(make_service, info, metrics, _Scheduler(), api_key="secret")

    async def scenario() -> list[int]:
        paths = ("/scheduler", "/plan", "/diagnose")
        codes = [(await call(app, "GET", path)).status_code for path in paths]
        return [*codes, (await call(app, "POST", "/drain", json={"node": "n"})).status_code]

    assert asyncio.run(scenario()) == [401] * 4
