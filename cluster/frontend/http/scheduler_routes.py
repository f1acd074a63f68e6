"""Routes to the scheduler: what it knows, what it would do, and emptying a node. Knows values and JSON; no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import Unavailable
from cluster.frontend.http.body import read_body
from cluster.frontend.openai_api.request_fields import StrictModel
from cluster.placement.explain import plan_as_dict
from cluster.protocols import SchedulerClient

_TIMEOUT_S = 5.0

Answer = TypeVar("Answer")


class DrainBody(StrictModel):
    """POST /drain. undo: use the node again."""

    node: str = Field(min_length=1, max_length=256)
    undo: bool = False


class SchedulerRoutes:
    """Answers 503 where there is no scheduler: one process without a cluster has none."""

    def __init__(self, scheduler: SchedulerClient | None) -> None:
        self._scheduler = scheduler

    async def status(self) -> Response:
        """GET /scheduler: workers, hosts, knowledge, placement, nodes being emptied."""
        return _json(await self._answer(self._client.status()))

    async def plan(self) -> Response:
        """GET /plan: what placement would move now, and why; nothing is moved."""
        return _json(plan_as_dict(await self._answer(self._client.plan())))

    async def diagnose(self) -> Response:
        """GET /diagnose: what routing and placement could gain."""
        return _json((await self._answer(self._client.diagnose())).as_dict())

    async def drain(self, request: Request) -> Response:
        """POST /drain {"node": "10.0.0.7"}: empty a node, or with "undo": true use it again; what is left there."""
        body = await read_body(request, DrainBody)
        client = self._client
        return _json(await self._answer(client.undrain(body.node) if body.undo else client.drain(body.node)))

    @property
    def _client(self) -> SchedulerClient:
        if self._scheduler is None:
            raise Unavailable("there is no scheduler: this server is one process")
        return self._scheduler

    async def _answer(self, call: Awaitable[Answer]) -> Answer:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                return await call
        except (ConnectionError, TimeoutError) as error:
            raise Unavailable(f"the scheduler does not answer ({type(error).__name__})") from error


def _json(value: object) -> Response:
    return Response(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS), 200, None, "application/json")
