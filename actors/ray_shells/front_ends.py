"""All front ends of the application that this process belongs to, asked at once: HTTP replicas and gRPC gateways."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from actors.ray_shells.deployments import INGRESS_DEPLOYMENT
from actors.ray_shells.gateway_actors import Gateways
from cluster.application import ApplicationId
from cluster.logs import log_event

_LOG = logging.getLogger(__name__)
_TIMEOUT_S = 5.0

Answers = Sequence[frozenset[str] | BaseException]


class ServeFrontEnds:
    """`FrontEnds` from within a Serve replica, which is one of them itself."""

    def __init__(self, application: ApplicationId) -> None:
        self._gateways = Gateways(application)

    async def abort_answers(self, names: tuple[str, ...]) -> tuple[frozenset[str], int]:
        """End the answers of those names; the names that were running, and how many front ends are silent."""
        parts = await asyncio.gather(self._ask_http(names), self._ask_gateways(names))
        answers = [answer for part in parts for answer in part]
        silent = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in silent:
            log_event(_LOG, logging.WARNING, "a front end did not say what it aborted", reason=repr(error))
        ended = [answer for answer in answers if not isinstance(answer, BaseException)]
        return frozenset[str]().union(*ended), len(silent)

    async def _ask_http(self, names: tuple[str, ...]) -> Answers:
        try:
            handle = serve.get_deployment_handle(INGRESS_DEPLOYMENT, serve.get_replica_context().app_name)
            async with asyncio.timeout(_TIMEOUT_S):
                calls = await handle.broadcast("abort_answers", names)._fetch_replica_results_async()
            waits = [asyncio.wait_for(call.get_async(), _TIMEOUT_S) for call in calls]
            return await asyncio.gather(*waits, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException, DeploymentUnavailableError) as error:
            return [error]

    async def _ask_gateways(self, names: tuple[str, ...]) -> Answers:
        try:
            return await asyncio.to_thread(self._gateways.abort_answers, names)
        except RayError as error:
            return [error]
