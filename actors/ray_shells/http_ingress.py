"""Step 1 of a request's walk under Ray Serve: the HTTP application as an ingress deployment. No logic."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from cluster.deployed_spec import DeployedSpec
from cluster.frontend.build import build_front_end
from cluster.frontend.generation.prompt_embedder import PromptEmbedder
from cluster.frontend.security.cross_site import exposure_notices
from cluster.logs import configure_logging, log_event
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus


class HttpIngress:
    """Serve ingress replica: owns one HTTP application. Its options are in `actors/ray_shells/deployments.py`."""

    def __init__(self, spec: DeployedSpec, workers: DeploymentHandle[Any]) -> None:
        from actors.ray_shells.front_ends import ServeFrontEnds
        from actors.ray_shells.scheduler_client import SchedulerLink
        from actors.ray_shells.worker_client import ServeWorkerClient

        configure_logging()
        config, application, info = spec.config, spec.application, spec.read_model()
        for notice in exposure_notices(config):
            log_event(logging.getLogger(__name__), logging.WARNING, notice)
        self._worker = ServeWorkerClient(workers, application=application, num_hosts=config.experts.hosts)
        scheduler, embedder = SchedulerLink(application), PromptEmbedder(info.path, info.vocab_size)
        peers = ServeFrontEnds(application)
        self._service, self._app = build_front_end(config, info, self._worker, scheduler, peers, embedder.embed)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        """The attention workers' status, for whoever started the application."""
        return await self._worker.worker_statuses()

    async def host_statuses(self) -> tuple[ExpertHostStatus, ...]:
        """The expert hosts' status."""
        return await self._worker.host_statuses()

    async def abort_answers(self, names: tuple[str, ...]) -> frozenset[str]:
        """End the answers of those names that are given here; the names that had a running sequence."""
        return self._service.abort_answers(names)

    async def begin_drain(self) -> None:
        """Refuse new requests from now on."""
        self._app.state.requests.begin_drain()

    async def num_in_flight(self) -> int:
        """Requests still being answered."""
        return self._app.state.requests.num_in_flight
