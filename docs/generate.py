"""Write `docs/config.md`, `docs/metrics.md` and `docs/api.md` from the code: `python docs/generate.py`.

`--check` writes nothing and ends with 1 where a page is out of date. Needs the `dev` extra (the proto compiler).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

DOCS = Path(__file__).resolve().parent
PROTO = DOCS.parent / "proto"
_WRITTEN = "<!-- Written by `python docs/generate.py`; change the code that it reads, not this page. -->"
_PUBLIC_PROTOS = ("generation", "cluster")  # expert.proto is between our own processes


def pages() -> dict[str, str]:
    """Text of every generated page, by file name."""
    return {"config.md": _config_page(), "metrics.md": _metrics_page(), "api.md": _api_page()}


def stale(directory: Path = DOCS) -> list[str]:
    """Names of pages in `directory` that are missing or are not what the code says."""
    return [
        name
        for name, text in pages().items()
        if not (directory / name).exists() or (directory / name).read_text() != text
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _first_line(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


# Configuration


def _config_page() -> str:
    from cluster.config.load import MoesaicConfig

    parts = [
        "# Configuration",
        _WRITTEN,
        "One YAML file has these sections. `moesaic serve --config FILE` reads it. The environment variable\n"
        "`MOESAIC__SECTION__FIELD` wins over the file, and command-line flags win over both. Unknown keys are errors.\n"
        "The same tree is `config:` in the values of the Helm chart and `args:` in a Ray Serve file.",
    ]
    for name, section in MoesaicConfig.model_fields.items():
        kind: Any = section.annotation
        rows = [
            (f"`{name}.{key}`", _type_text(field), _default_text(field), field.description or "")
            for key, field in kind.model_fields.items()
        ]
        parts += [f"## {name}", _first_line(kind.__doc__), _table(("key", "values", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _type_text(field: Any) -> str:
    bounds = []
    for constraint in field.metadata:
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if (value := getattr(constraint, name, None)) is not None:
                bounds.append(f"{sign} {value:g}")
    return ", ".join([_kind_text(field.annotation), *bounds])


def _kind_text(kind: Any) -> str:
    origin, arguments = get_origin(kind), [one for one in get_args(kind) if one is not NoneType]
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_kind_text, arguments))
    if origin is tuple:
        return f"list of {_kind_text(arguments[0])}"
    if origin is dict:
        return "map of text to number"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "`true`, `false`", "SecretStr": "secret text"}
    return names.get(kind.__name__, kind.__name__)


def _default_text(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    if default is None or default in ((), {}, ""):
        return ""
    return f"`{json.dumps(default)}`" if isinstance(default, bool | int | float) else f"`{default}`"


# Metrics


def _metrics_page() -> str:
    from cluster.observability.metrics import FrontendMetrics
    from cluster.observability.scheduler_metrics import scheduler_metrics_text
    from cluster.observability.worker_metrics import worker_metrics_text
    from cluster.status.experts import ClusterActivations
    from cluster.status.host import ExpertHostStatus
    from cluster.status.scheduler import SchedulerStatus
    from cluster.status.worker import WorkerStatus

    front_end = FrontendMetrics()
    front_end.count_sequence(finished_reason="stop", wait_s=1, prompt_tokens=1, completion_tokens=1, cached_tokens=1)
    front_end.count_rejection("queue_full")
    front_end.count_http(route="/", code=200)
    processes = worker_metrics_text(
        [_sample(WorkerStatus)], [_sample(ExpertHostStatus)], _sample(ClusterActivations), per_expert=True
    )
    sections = (
        ("Front end", "Counted by each front end; add them up.", front_end.text()),
        (
            "Attention workers and expert hosts",
            "One series for each process, by the label `process`. Series with the label `expert` appear only with "
            "`metrics.per_expert`.",
            processes,
        ),
        (
            "Scheduler",
            "Every front end gives the same values; do not add them up.",
            scheduler_metrics_text(_sample(SchedulerStatus)),
        ),
    )
    parts = ["# Metrics", _WRITTEN, "`GET /metrics` gives these in Prometheus' text format."]
    for title, text, exposed in sections:
        parts += [f"## {title}", text, _table(("metric", "type", "labels", "meaning"), _families(exposed))]
    return "\n\n".join(parts) + "\n"


def _families(exposed: str) -> list[tuple[str, str, str, str]]:
    from prometheus_client.parser import text_string_to_metric_families

    rows: list[tuple[str, str, str, str]] = []
    for family in text_string_to_metric_families(exposed):
        if family.name.endswith("_created"):
            continue
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        # The labels of the first sample are all there are; `le` belongs to a histogram's buckets.
        labels = sorted({label for sample in family.samples[:1] for label in sample.labels} - {"le"})
        rows.append(
            (f"`{family.name}{suffix}`", family.type, ", ".join(f"`{one}`" for one in labels), family.documentation)
        )
    return rows


def _sample(kind: Any) -> Any:
    """A value of that type with every field filled in, so that every metric that is made of it appears."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _sample(next(one for one in arguments if one is not NoneType))
    if origin is tuple:
        return (_sample(arguments[0]),) if arguments[-1] is Ellipsis else tuple(map(_sample, arguments))
    if origin in (list, Sequence):
        return [_sample(arguments[0])]
    if origin is not None and len(arguments) == 2:  # a mapping
        return {_sample(arguments[0]): _sample(arguments[1])}
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: _sample(hints[field.name]) for field in fields(kind) if field.init})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return next(iter(kind))
    return {bool: False, int: 1, float: 1.0, str: "x", bytes: b"x"}[kind]


# HTTP and gRPC


def _api_page() -> str:
    document = _openapi()
    parts = [
        "# API",
        _WRITTEN,
        "A running server describes itself at `/openapi.json`, for people at `/docs`, and over gRPC reflection.",
        "## HTTP routes",
        _table(("route", "what", "body", "own errors"), _routes(document)),
        "Every route may also answer 401 (wrong key), 429 (too much is waiting), 500, 503 (starting, draining) and\n"
        "504 (time ran out). 429 and 503 carry `Retry-After`. Errors have OpenAI's envelope.",
        "## Request bodies",
        "A field that is null counts as left out.",
    ]
    schemas = document["components"]["schemas"]
    for name in sorted(_bodies(document)):
        schema = schemas[name]
        served = [(key, one) for key, one in schema["properties"].items() if not _is_refused(one)]
        rows = [(f"`{key}`", _schema_text(one), _schema_default(one, key, schema)) for key, one in served]
        refused = [f"`{key}`" for key, one in schema["properties"].items() if _is_refused(one)]
        parts += [f"### {name}", _first_line(schema.get("description")), _table(("field", "type", "default"), rows)]
        if refused:
            parts.append("Known, and refused unless they ask for nothing: " + ", ".join(refused) + ".")
    parts += [
        "## gRPC",
        "Package `moesaic.v1`, in `proto/moesaic/v1/`. Optional fields left out have a default.",
        *_grpc(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _openapi() -> dict[str, Any]:
    from cluster.frontend.http.api_routes import ApiRoutes

    routes = ApiRoutes(guarded=None, is_strict=False, vocab_size=4096, root_path="")
    return json.loads(bytes(asyncio.run(routes.openapi()).body))


def _routes(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for path, methods in document["paths"].items():
        for method, one in methods.items():
            if method == "head":
                continue
            codes = [code for code in one["responses"] if code in ("403", "404", "409", "422")]
            rows.append((f"`{method.upper()} {path}`", one["summary"], _body_of(one), ", ".join(codes)))
    return rows


def _body_of(operation: dict[str, Any]) -> str:
    body = operation.get("requestBody")
    return "" if body is None else body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]


def _bodies(document: dict[str, Any]) -> set[str]:
    named = {_body_of(one) for methods in document["paths"].values() for one in methods.values()}
    return (named | {"Message", "StreamOptions"}) - {""}


def _is_refused(schema: dict[str, Any]) -> bool:
    return schema.get("description", "").startswith("Not served")


def _schema_text(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        texts = [_schema_text(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(texts))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_schema_text(schema.get('items', {}))}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    # Bounds of token ids follow from the model's vocabulary and those of seeds from 64 bits: neither helps a reader.
    bounds = [f"{sign} {schema[name]}" for name, sign in signs.items() if name in schema and abs(schema[name]) < 4096]
    return ", ".join([schema.get("type", schema.get("description", "anything")), *bounds])


def _schema_default(schema: dict[str, Any], key: str, parent: dict[str, Any]) -> str:
    if key in parent.get("required", ()):
        return "required"
    default = schema.get("default")
    return "" if default is None else f"`{json.dumps(default)}`"


def _grpc() -> list[str]:
    parts: list[str] = []
    for file in _descriptors():
        comments = {tuple(one.path): " ".join(one.leading_comments.split()) for one in file.source_code_info.location}
        for i, service in enumerate(file.service):
            rows = [
                (f"`{rpc.name}`", _message_name(rpc.input_type), _answer(rpc), comments.get((6, i, 2, j), ""))
                for j, rpc in enumerate(service.method)
            ]
            parts += [f"### {service.name}", comments.get((6, i), "")]
            parts.append(_table(("call", "request", "answer", "what"), rows))
        for i, message in enumerate(file.message_type):
            rows = [
                (f"`{field.name}`", _field_type(field), comments.get((4, i, 2, j), ""))
                for j, field in enumerate(message.field)
            ]
            if rows:
                parts += [f"### {message.name}", comments.get((4, i), "")]
                parts.append(_table(("field", "type", "meaning"), rows))
    return parts


def _descriptors() -> list[Any]:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from grpc_tools import protoc

    names = [f"moesaic/v1/{name}.proto" for name in _PUBLIC_PROTOS]
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "descriptors"
        includes = (f"-I{PROTO}", f"-I{resources.files('grpc_tools') / '_proto'}")
        code = protoc.main(["protoc", *includes, "--include_source_info", f"--descriptor_set_out={output}", *names])
        if code != 0:
            raise RuntimeError(f"protoc ended with {code}")
        return list(FileDescriptorSet.FromString(output.read_bytes()).file)


def _message_name(full: str) -> str:
    return full.rpartition(".")[2]


def _answer(rpc: Any) -> str:
    return ("stream of " if rpc.server_streaming else "") + _message_name(rpc.output_type)


def _field_type(field: Any) -> str:
    name = _message_name(field.type_name) or str(_scalar_name(field.type))
    return f"list of {name}" if field.label == field.LABEL_REPEATED else name


def _scalar_name(number: int) -> str:
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto

    return FieldDescriptorProto.Type.Name(number).removeprefix("TYPE_").lower()


def _run(arguments: Sequence[str], write: Callable[[str], object]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a page is out of date")
    if parser.parse_args(arguments).check:
        found = stale()
        if found:
            write(f"out of date: {', '.join(found)}; run `python docs/generate.py`\n")
        return int(bool(found))
    for name, text in pages().items():
        (DOCS / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1:], sys.stderr.write))
