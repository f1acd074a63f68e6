"""What our request router needs of Ray Serve's alpha API, exercised on Ray's own routing loop without a cluster.

A Ray release that renames or changes any of it fails here, not in a server that routes by chance.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.router import AsyncioRouter
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter
from scheduler_values import bits, generation, knowledge, worker_report

from actors.ray_shells.request_router import ExpertRequestRouter
from actors.ray_shells.scheduler_client import SchedulerLink
from cluster.errors import Unavailable
from cluster.status.reports import RoutingView
from cluster.types import Tier

DEADLINE_S = 10.0
DEPLOYMENT = DeploymentID(name="AttentionWorker", app_name="moesaic")
OPTIONS = {"routing": "semantic", "application": ("moesaic", "moesaic"), "block_size": 16, "poll_s": 0.01}
FIRST, SECOND = (np.array(vector, dtype=np.int8).tobytes() for vector in ((127, 0), (0, 127)))


class _Replica:
    """What the routing loop asks of a running replica."""

    max_ongoing_requests = 100
    node_id = "node-a"
    multiplexed_model_ids: frozenset[str] = frozenset()

    def __init__(self, unique_id: str) -> None:
        self.replica_id = ReplicaID(unique_id, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


class _Views:
    """Stands for the scheduler. `asked`: versions that routers said they know."""

    def __init__(self, view: RoutingView | None = None) -> None:
        self.view = view
        self.asked: list[int] = []
        self.told = asyncio.Event()

    async def answer(self, known_version: int) -> RoutingView:
        self.asked.append(known_version)
        if len(self.asked) > 1:
            self.told.set()  # the first one has been taken
        if self.view is None:
            raise Unavailable("there is no scheduler")
        return self.view


@asynccontextmanager
async def _router(
    monkeypatch: pytest.MonkeyPatch, views: _Views, replicas: list[_Replica]
) -> AsyncIterator[ExpertRequestRouter]:
    """As ray.serve._private.router.AsyncioRouter makes one."""
    monkeypatch.setattr(SchedulerLink, "routing_view", lambda self, version: views.answer(version))
    router = ExpertRequestRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_node_id="node-a",
        self_actor_id="actor",
        self_actor_handle=None,
        use_replica_queue_len_cache=True,
        create_replica_wrapper_func=lambda info: info,
        prefer_local_node_routing=False,
        prefer_local_az_routing=False,
        self_availability_zone=None,
    )
    router.initialize_state(**OPTIONS)
    router.update_replicas(replicas)  # type: ignore[arg-type]
    try:
        yield router
    finally:
        router.update_replicas([])


def _pending(*args: Any, internal_id: str = "one http request") -> PendingRequest:
    metadata = RequestMetadata(request_id="id", internal_request_id=internal_id, call_method="submit")
    return PendingRequest(args=list(args), kwargs={}, metadata=metadata)


async def _choose(router: ExpertRequestRouter, *requests: PendingRequest) -> list[str]:
    async with asyncio.timeout(DEADLINE_S):
        chosen = await asyncio.gather(*(router._choose_replica_for_request(request) for request in requests))
    return [replica.replica_id.unique_id for replica in chosen]


def _view() -> RoutingView:
    workers = tuple(
        (worker_report(name, replica_id=name, resident=resident, miss_s={Tier.DISK: 0.02}), 0.0)
        for name, resident in (("w0", bits(0, 1, 4, 5)), ("w1", bits(2, 3, 6, 7)))
    )
    return RoutingView(workers=workers, knowledge=knowledge(5))


def test_a_request_goes_to_the_replica_that_was_chosen_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        views = _Views(_view())
        async with _router(monkeypatch, views, [_Replica("w0"), _Replica("w1")]) as router:
            await asyncio.wait_for(views.told.wait(), DEADLINE_S)
            kinds = [FIRST, SECOND] * 4
            requests = [_pending(generation(str(i), embedding=kind), "address") for i, kind in enumerate(kinds)]

            chosen = await _choose(
                router, *requests
            )  # all at once, as the choices of one answer: their internal id is one

        assert views.asked[:2] == [0, 5]
        right = sum(name == ("w0" if kind is FIRST else "w1") for name, kind in zip(chosen, kinds, strict=True))
        assert right >= 6  # load alone decides now and then

    asyncio.run(scenario())


def test_all_choices_of_one_answer_are_routed_without_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with _router(monkeypatch, _Views(), [_Replica("w0"), _Replica("w1")]) as router:
            chosen = await _choose(router, *(_pending(generation(str(i)), "address") for i in range(6)))

        assert sorted(chosen) == ["w0"] * 3 + ["w1"] * 3

    asyncio.run(scenario())


def test_an_avoided_replica_is_left_out_while_there_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with _router(monkeypatch, _Views(), [_Replica("w0"), _Replica("w1")]) as router:
            chosen = [await _choose(router, _pending(generation(avoid=("w0",)), "address")) for _ in range(5)]

        assert chosen == [["w1"]] * 5

    asyncio.run(scenario())


def test_one_replica_needs_no_scheduler_and_other_calls_go_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        views = _Views(_view())
        async with _router(monkeypatch, views, [_Replica("only")]) as router:
            assert await _choose(router, _pending(generation(), "address")) == ["only"]
            assert await _choose(router, _pending()) == ["only"]
        assert views.asked == []

    asyncio.run(scenario())


def test_ray_has_what_the_router_overrides_and_uses() -> None:
    """Names, and the arguments that Ray calls them with."""
    signatures = {
        "choose_replicas": ["self", "candidate_replicas", "pending_request"],
        "update_replicas": ["self", "replicas"],
        "initialize_state": ["self", "kwargs"],
        "_fulfill_next_pending_request": ["self", "replica", "request_metadata"],
        "_record_queue_wait_time": ["self", "pending_request"],
        "_remove_pending_request_from_indices": ["self", "pending_request"],
        "_choose_replica_for_request": ["self", "pending_request", "is_retry"],
    }
    found = {name: list(inspect.signature(getattr(RequestRouter, name)).parameters) for name in signatures}
    assert found == signatures
    source = inspect.getsource(AsyncioRouter)
    assert "initialize_state(**(self._request_router_kwargs))" in source


def test_serve_carries_the_class_to_other_processes() -> None:
    config = RequestRouterConfig(request_router_class=ExpertRequestRouter, request_router_kwargs=OPTIONS)

    loaded: Any = config.get_request_router_class()

    assert loaded.__name__ == "ExpertRequestRouter"
    assert {"choose_replicas", "_fulfill_next_pending_request"} <= set(vars(loaded))
