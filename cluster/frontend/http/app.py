"""The HTTP face: which routes there are and what every request passes through. Knows FastAPI; no shapes, no Ray."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from cluster.config.sections import FrontendConfig
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.http.api_routes import ApiRoutes
from cluster.frontend.http.body import BodyReader
from cluster.frontend.http.errors import install_error_responses
from cluster.frontend.http.middleware import (
    IGNORED_FIELDS_HEADER,
    Admission,
    ApiKey,
    BodyLimit,
    RequestContext,
    SameSite,
)
from cluster.frontend.http.open_requests import OpenRequests
from cluster.frontend.http.operator_routes import OperatorRoutes
from cluster.frontend.http.root_page import root_page
from cluster.frontend.http.root_path import RootPath
from cluster.frontend.http.scheduler_routes import SchedulerRoutes
from cluster.frontend.http.tokenize_routes import TokenizeRoutes
from cluster.frontend.openai_api.routes import OpenAIRoutes
from cluster.frontend.security.api_keys import Keys, Level
from cluster.frontend.security.cross_site import CrossSite
from cluster.model.info import ModelInfo
from cluster.observability.metrics import FrontendMetrics
from cluster.protocols import AttentionWorkerClient, FrontEnds, SchedulerClient

_GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")
_TEXT_PATHS = ("/tokenize", "/detokenize", "/tokenizer_info", "/abort_requests")
_SCHEDULER_PATHS = ("/scheduler", "/plan", "/diagnose", "/drain")
_READ = ["GET", "HEAD"]
_EXPOSED_HEADERS = ("x-request-id", "retry-after", IGNORED_FIELDS_HEADER)
_OPERATOR_PATHS = ("/experts", "/status", *_SCHEDULER_PATHS)
_CHANGING_PATHS = ("/experts/cache", "/drain", "/abort_requests")
_GUARDED_PATHS = {
    Level.CLIENT: ("/v1", *_TEXT_PATHS),
    Level.OPERATOR_READS: _OPERATOR_PATHS,
    Level.OPERATOR_CHANGES: ("/experts/cache", "/drain"),
}


def create_app(
    service: GenerationService,
    worker: AttentionWorkerClient,
    info: ModelInfo,
    config: FrontendConfig,
    metrics: FrontendMetrics,
    *,
    scheduler: SchedulerClient | None = None,
    peers: FrontEnds | None = None,
    per_expert_metrics: bool = False,
    notices: Sequence[str] = (),
) -> FastAPI:
    """Build the application. Args: notices: what operators should know of the configuration; /status shows it.

    `app.state.requests` is its `OpenRequests`: `begin_drain()`, `num_in_flight`."""
    app = FastAPI(title="Moesaic", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    requests = OpenRequests(metrics.set_in_flight)
    app.state.requests = requests
    app.state.bodies = BodyReader(service.inputs, max_bytes=config.max_body_bytes, refuses_unknown=config.strict)
    openai = OpenAIRoutes(service, info, config, peers)
    text = TokenizeRoutes(service, info)
    keys = Keys.of(config)
    operator = OperatorRoutes(
        worker,
        requests,
        metrics,
        scheduler=scheduler,
        per_expert_metrics=per_expert_metrics,
        max_age_s=config.status_max_age_s,
        notices=notices,
    )
    central = SchedulerRoutes(scheduler)
    levels = [level for level in _GUARDED_PATHS if level is not Level.CLIENT or keys.client is not None]
    guarded = tuple(path for level in levels for path in _GUARDED_PATHS[level]) if keys.are_set else None
    api = ApiRoutes(guarded=guarded, is_strict=config.strict, vocab_size=info.vocab_size, root_path=config.root_path)
    app.add_api_route("/v1/chat/completions", openai.chat, methods=["POST"])
    app.add_api_route("/v1/completions", openai.complete, methods=["POST"])
    app.add_api_route("/v1/models", openai.list_models, methods=_READ)
    app.add_api_route("/v1/models/{model:path}", openai.show_model, methods=_READ)
    app.add_api_route("/abort_requests", openai.abort, methods=["POST"])
    app.add_api_route("/tokenize", text.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", text.detokenize, methods=["POST"])
    app.add_api_route("/tokenizer_info", text.tokenizer_info, methods=_READ)
    app.add_api_route("/health", operator.health, methods=_READ)
    app.add_api_route("/ready", operator.ready, methods=_READ)
    app.add_api_route("/metrics", operator.metrics_text, methods=_READ)
    app.add_api_route("/experts", operator.experts, methods=_READ)
    app.add_api_route("/experts/cache", operator.set_expert_cache, methods=["POST"])
    app.add_api_route("/status", operator.status, methods=_READ)
    app.add_api_route("/scheduler", central.status, methods=_READ)
    app.add_api_route("/plan", central.plan, methods=_READ)
    app.add_api_route("/diagnose", central.diagnose, methods=_READ)
    app.add_api_route("/drain", central.drain, methods=["POST"])
    app.add_api_route("/load", operator.load, methods=_READ)
    app.add_api_route("/version", operator.version, methods=_READ)
    app.add_api_route("/openapi.json", api.openapi, methods=_READ)
    app.add_api_route("/docs", api.docs, methods=_READ)
    app.add_api_route("/", root_page(app, info, tells_model=config.api_key is None), methods=_READ)
    install_error_responses(app)
    # The last one added sees a request first.
    app.add_middleware(Admission, requests=requests, paths=_GENERATION_PATHS, metrics=metrics)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, max_arriving_bytes=config.max_arriving_bytes)
    if keys.are_set:
        app.add_middleware(ApiKey, keys=keys, guarded=_GUARDED_PATHS)
    allowed = CrossSite((*config.allowed_hosts,), (*config.operator_origins,), has_keys=keys.are_set)
    app.add_middleware(SameSite, allowed=allowed, paths=(*_OPERATOR_PATHS, "/abort_requests"), changing=_CHANGING_PATHS)
    routes = [
        *_GENERATION_PATHS,
        *_TEXT_PATHS,
        "/v1/models",
        "/experts",
        "/experts/cache",
        "/status",
        *_SCHEDULER_PATHS,
    ]
    app.add_middleware(RequestContext, metrics=metrics, routes=routes)
    if config.root_path:
        app.add_middleware(RootPath, prefix=config.root_path)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_credentials=config.cors_credentials,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    return app
