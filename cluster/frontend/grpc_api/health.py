"""`grpc.health.v1` whole: the library's asyncio service answers `Check` and `Watch`, here is `List`."""

from __future__ import annotations

from typing import Any, cast

from grpc_health.v1 import health, health_pb2

from cluster.frontend.grpc_api.calls import Context

_MESSAGES = cast("Any", health_pb2)  # its published types do not know `List` yet


class ListedHealth(health.aio.HealthServicer):
    """Shows what `set` told it, of one service or of all."""

    def __init__(self) -> None:
        super().__init__()
        self._statuses: dict[str, int] = {}

    async def show(self, service: str, *, serving: bool) -> None:
        """Show the status of a service from now on."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.set(service, status)
        self._statuses[service] = status

    async def List(self, request: object, context: Context) -> object:  # noqa: N802 - the name is the protocol's
        """The status of every service that has one."""
        answers = {name: health_pb2.HealthCheckResponse(status=cast("Any", s)) for name, s in self._statuses.items()}
        return _MESSAGES.HealthListResponse(statuses=answers)
