"""The HTTP face: which routes there are and what every request passes through. Knows FastAPI; no shapes, no Ray."""

from __future__ import annotations

from fastapi import FastAPI

from cluster.config_sections import FrontendConfig
from cluster.frontend.generation import GenerationService
from cluster.frontend.http_body import BodyReader
from cluster.frontend.http_errors import install_error_responses
from cluster.frontend.http_middleware import Admission, ApiKey, BodyLimit, RequestContext
from cluster.frontend.open_requests import OpenRequests
from cluster.frontend.openai_routes import OpenAIRoutes
from cluster.frontend.operator_routes import OperatorRoutes
from cluster.frontend.root_page import root_page
from cluster.frontend.root_path import RootPath
from cluster.frontend.scheduler_routes import SchedulerRoutes
from cluster.frontend.tokenize_routes import TokenizeRoutes
from cluster.model_info import ModelInfo
from cluster.observability.metrics import FrontendMetrics
from cluster.protocols import AttentionWorkerClient, FrontEnds, SchedulerClient

_GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")
_TEXT_PATHS = ("/tokenize", "/detokenize", "/abort_requests")
_SCHEDULER_PATHS = ("/scheduler", "/plan", "/diagnose", "/drain")
_GUARDED_PATHS = ("/v1", "/experts", "/status", *_SCHEDULER_PATHS, *_TEXT_PATHS)


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
) -> FastAPI:
    """Build the application. `app.state.requests` is its `OpenRequests`: `begin_drain()`, `num_in_flight`."""
    app = FastAPI(title="Moesaic", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    requests = OpenRequests(metrics.set_in_flight)
    app.state.requests = requests
    app.state.bodies = BodyReader(service.inputs, max_bytes=config.max_body_bytes, refuses_unknown=config.strict)
    openai = OpenAIRoutes(service, info, config, peers)
    text = TokenizeRoutes(service, info)
    operator = OperatorRoutes(worker, requests, metrics, scheduler=scheduler, per_expert_metrics=per_expert_metrics)
    central = SchedulerRoutes(scheduler)
    app.add_api_route("/v1/chat/completions", openai.chat, methods=["POST"])
    app.add_api_route("/v1/completions", openai.complete, methods=["POST"])
    app.add_api_route("/v1/models", openai.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", openai.show_model, methods=["GET"])
    app.add_api_route("/abort_requests", openai.abort, methods=["POST"])
    app.add_api_route("/tokenize", text.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", text.detokenize, methods=["POST"])
    app.add_api_route("/health", operator.health, methods=["GET"])
    app.add_api_route("/ready", operator.ready, methods=["GET"])
    app.add_api_route("/metrics", operator.metrics_text, methods=["GET"])
    app.add_api_route("/experts", operator.experts, methods=["GET"])
    app.add_api_route("/experts/cache", operator.set_expert_cache, methods=["POST"])
    app.add_api_route("/status", operator.status, methods=["GET"])
    app.add_api_route("/scheduler", central.status, methods=["GET"])
    app.add_api_route("/plan", central.plan, methods=["GET"])
    app.add_api_route("/diagnose", central.diagnose, methods=["GET"])
    app.add_api_route("/drain", central.drain, methods=["POST"])
    app.add_api_route("/load", operator.load, methods=["GET"])
    app.add_api_route("/version", operator.version, methods=["GET"])
    app.add_api_route("/", root_page(app, info, tells_model=config.api_key is None), methods=["GET", "HEAD"])
    install_error_responses(app)
    # The last one added sees a request first.
    app.add_middleware(Admission, requests=requests, paths=_GENERATION_PATHS, metrics=metrics)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, max_arriving_bytes=config.max_arriving_bytes)
    if config.api_key is not None:
        app.add_middleware(ApiKey, key=config.api_key.get_secret_value(), guarded=_GUARDED_PATHS)
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
    return app
