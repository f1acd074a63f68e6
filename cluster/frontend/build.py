"""Puts a front end together: the generation service and the HTTP application over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI

from cluster.config.load import MoesaicConfig
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.frontend.http.app import create_app
from cluster.frontend.security.cross_site import exposure_notices
from cluster.model.info import ModelInfo
from cluster.observability.metrics import FrontendMetrics
from cluster.protocols import AttentionWorkerClient, FrontEnds, SchedulerClient


def build_front_end(
    config: MoesaicConfig,
    info: ModelInfo,
    worker: AttentionWorkerClient,
    scheduler: SchedulerClient | None = None,
    peers: FrontEnds | None = None,
    embed: Callable[[Sequence[int]], bytes] = lambda _: b"",
) -> tuple[GenerationService, FastAPI]:
    """The generation service and the HTTP application over `worker`.

    Args: scheduler, peers: None in a single process. embed: what a prompt means.
    """
    metrics = FrontendMetrics()
    service = GenerationService(worker, Tokenizer.load(info.path), info, config.frontend, metrics, embed)
    return service, create_app(
        service,
        worker,
        info,
        config.frontend,
        metrics,
        scheduler=scheduler,
        peers=peers,
        per_expert_metrics=config.metrics.per_expert,
        notices=exposure_notices(config),
    )
