"""GET /openapi.json and /docs: what this server answers, route by route. Knows the routes by name, not their code."""

from __future__ import annotations

from functools import cache

import orjson
from pydantic import TypeAdapter
from starlette.responses import HTMLResponse, Response

from cluster.frontend.http.root_page import program_version
from cluster.frontend.http.scheduler_routes import DrainBody
from cluster.frontend.openai_api.schema import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExpertCacheBody,
    TokenizeRequest,
)
from cluster.frontend.openapi.docs_page import docs_page
from cluster.frontend.openapi.document import Operation, openapi_document
from cluster.frontend.openapi.schemas import Schema, a_list, an_object, named, or_null
from cluster.status.expert_memory import ExpertMemoryStatus
from cluster.status.experts import ClusterActivations, LayerExperts
from cluster.status.host import ExpertHostStatus
from cluster.status.scheduler import SchedulerStatus
from cluster.status.worker import WorkerStatus

OPERATIONS = (
    Operation(
        path="/v1/chat/completions",
        method="post",
        summary="Continue a conversation.",
        body=ChatRequest,
        answer="ChatCompletion",
        stream="ChatCompletionChunk",
        errors=(404, 422),
    ),
    Operation(
        path="/v1/completions",
        method="post",
        summary="Continue texts or token ids.",
        body=CompletionRequest,
        answer="Completion",
        stream="Completion",
        errors=(404, 422),
    ),
    Operation(path="/v1/models", summary="The model that is served.", answer="ModelList"),
    Operation(path="/v1/models/{model}", summary="One model.", answer="Model", errors=(404,)),
    Operation(
        path="/abort_requests",
        method="post",
        summary="End answers, by their ids or by x-request-id, with what they have.",
        body=AbortRequest,
        answer="Aborted",
        errors=(403,),
    ),
    Operation(
        path="/tokenize",
        method="post",
        summary="Token ids of a prompt or of a conversation.",
        body=TokenizeRequest,
        answer="Tokens",
        errors=(404,),
    ),
    Operation(
        path="/detokenize",
        method="post",
        summary="Text of token ids, special tokens included.",
        body=DetokenizeRequest,
        answer="DetokenizedPrompt",
        errors=(404,),
    ),
    Operation(path="/tokenizer_info", summary="The tokenizer's settings and chat template.", answer="TokenizerInfo"),
    Operation(path="/health", summary="The process lives.", answer="Health"),
    Operation(path="/ready", summary="Requests would be answered.", answer="Readiness"),
    Operation(path="/metrics", summary="For Prometheus.", answer=None, media="text/plain"),
    Operation(path="/experts", summary="Residency and activation by layer.", answer="ExpertsPage"),
    Operation(
        path="/experts/cache",
        method="post",
        summary="Change every worker's fast expert memory, until it restarts.",
        body=ExpertCacheBody,
        answer="ExpertCachePage",
        errors=(403, 409),
    ),
    Operation(path="/status", summary="What workers and hosts say of themselves.", answer="StatusPage"),
    Operation(path="/scheduler", summary="What the scheduler knows.", answer="SchedulerStatus"),
    Operation(path="/plan", summary="What placement would move now, and why.", answer="Page", errors=(403, 409)),
    Operation(path="/diagnose", summary="What routing and placement could gain.", answer="Page"),
    Operation(
        path="/drain",
        method="post",
        summary="Empty a node, or use it again.",
        body=DrainBody,
        answer="Page",
        errors=(403, 409),
    ),
    Operation(path="/load", summary="How many requests this front end is answering.", answer="Load"),
    Operation(path="/version", summary="The program's version.", answer="Version"),
    Operation(path="/", summary="What listens here and where to look.", answer="RootPage"),
    Operation(path="/openapi.json", summary="This document.", answer="Page"),
    Operation(path="/docs", summary="This document for people.", answer=None, media="text/html"),
)

_REFERENCES = "#/components/schemas/{model}"


class ApiRoutes:
    """Made once, when they are first asked for: schemas of all pages take a moment."""

    def __init__(self, *, guarded: tuple[str, ...] | None, is_strict: bool, vocab_size: int, root_path: str) -> None:
        """Args: guarded: beginnings of paths that need a key; None: there is no key."""
        self._guarded = guarded
        self._is_strict = is_strict
        self._vocab_size = vocab_size
        self._root_path = root_path
        self._json = cache(self._dumped)
        self._html = cache(self._rendered)

    async def openapi(self) -> Response:
        """GET /openapi.json"""
        return Response(self._json(), media_type="application/json")

    async def docs(self) -> Response:
        """GET /docs"""
        return HTMLResponse(self._html())

    def _dumped(self) -> bytes:
        document = openapi_document(
            OPERATIONS,
            version=program_version(),
            pages=_pages(),
            guarded=self._guarded,
            is_strict=self._is_strict,
            vocab_size=self._vocab_size,
            root_path=self._root_path,
        )
        return orjson.dumps(document)

    def _rendered(self) -> str:
        return docs_page(orjson.loads(self._json()))


def _pages() -> dict[str, Schema]:
    """Schemas of the pages that are made of dataclasses."""
    schemas: dict[str, Schema] = {}
    for kind in (WorkerStatus, ExpertHostStatus, ExpertMemoryStatus, LayerExperts, ClusterActivations, SchedulerStatus):
        schema = TypeAdapter[object](kind).json_schema(mode="serialization", ref_template=_REFERENCES)
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    memory = or_null(named("ExpertMemoryStatus"))
    owner = an_object({"id": {"type": "string"}, "memory": memory, "layers": a_list(named("LayerExperts"))})
    schemas["ExpertsPage"] = an_object(
        {"workers": a_list(owner), "hosts": a_list(owner), "cluster": or_null(named("ClusterActivations"))}
    )
    schemas["ExpertCachePage"] = an_object({"workers": a_list(an_object({"id": {"type": "string"}, "memory": memory}))})
    schemas["StatusPage"] = an_object(
        {
            "workers": a_list(named("WorkerStatus")),
            "hosts": a_list(named("ExpertHostStatus")),
            "draining": {"type": "boolean"},
            "num_in_flight": {"type": "integer"},
        }
    )
    return schemas
