from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fakes import FakeAttentionWorker
from fastapi import FastAPI

from cluster.config.sections import FrontendConfig
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.frontend.http.app import create_app
from cluster.model.info import ModelInfo, load_model_info
from cluster.observability.metrics import FrontendMetrics


@pytest.fixture(scope="session")
def info() -> ModelInfo:
    return load_model_info("moesaic-demo")


@pytest.fixture(scope="session")
def tokenizer(info: ModelInfo) -> Tokenizer:
    return Tokenizer.load(info.path)


@pytest.fixture
def metrics() -> FrontendMetrics:
    return FrontendMetrics()


@pytest.fixture
def make_service(tokenizer: Tokenizer, info: ModelInfo, metrics: FrontendMetrics) -> Callable[..., GenerationService]:
    def make(worker: FakeAttentionWorker, **config: Any) -> GenerationService:
        return GenerationService(worker, tokenizer, info, FrontendConfig(**config), metrics)

    return make


@pytest.fixture
def make_app(
    make_service: Callable[..., GenerationService], info: ModelInfo, metrics: FrontendMetrics
) -> Callable[..., FastAPI]:
    def make(worker: FakeAttentionWorker | None = None, **config: Any) -> FastAPI:
        worker = worker or FakeAttentionWorker()
        config.setdefault("status_max_age_s", 0.0)  # what a test has changed shows at once
        return create_app(make_service(worker, **config), worker, info, FrontendConfig(**config), metrics)

    return make


@pytest.fixture
def call() -> Callable[..., Awaitable[httpx.Response]]:
    async def send(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **arguments)

    return send
