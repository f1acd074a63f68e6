"""JSON schemas of what the HTTP routes answer, for `/openapi.json`. Objects may grow fields, so none is closed."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_ANY: Schema = {}


def an_object(required: Schema, optional: Schema | None = None) -> Schema:
    """An object with those properties."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def a_list(items: Schema) -> Schema:
    """An array of those."""
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    """That or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def named(name: str) -> Schema:
    """A reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


_IDS = a_list(_COUNT)
_FINISH = or_null({"enum": ["stop", "length", "abort"]})
_STOP_REASON = or_null({"type": ["string", "integer"]})
_TOP_TOKEN = an_object({"token": _TEXT, "logprob": _NUMBER, "bytes": or_null(_IDS)})
_TOKEN = an_object({"token": _TEXT, "logprob": _NUMBER, "bytes": or_null(_IDS), "top_logprobs": a_list(_TOP_TOKEN)})
_CHAT_LOGPROBS = or_null(an_object({"content": or_null(a_list(_TOKEN))}))
_COMPLETION_LOGPROBS = or_null(
    an_object(
        {
            "tokens": a_list(_TEXT),
            "token_logprobs": a_list(or_null(_NUMBER)),
            "top_logprobs": or_null(a_list(or_null({"type": "object", "additionalProperties": _NUMBER}))),
            "text_offset": a_list(_COUNT),
        }
    )
)
_PROMPT_LOGPROBS = or_null(a_list(or_null({"type": "object"})))
_HEAD: Schema = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": or_null(_TEXT)}
_SCORED: Schema = {"prompt_logprobs": _PROMPT_LOGPROBS, "prompt_token_ids": or_null(_IDS)}
_PERMISSION = an_object({"id": _TEXT, "object": {"const": "model_permission"}, "created": _COUNT})

ANSWERS: dict[str, Schema] = {
    "Error": an_object(
        {
            "error": an_object(
                {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": or_null(_TEXT),
                    "code": or_null({"type": ["string", "integer"]}),
                }
            )
        }
    ),
    "Usage": an_object(
        {"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT},
        {"prompt_tokens_details": or_null(an_object({"cached_tokens": _COUNT}))},
    ),
    "Metrics": an_object(
        {},
        {
            name: {"type": "number", "minimum": 0}
            for name in (
                "time_to_first_token_ms",
                "generation_time_ms",
                "queue_time_ms",
                "mean_itl_ms",
                "tokens_per_second",
            )
        },
    ),
    "ChatCompletion": an_object(
        {
            **_HEAD,
            "object": {"const": "chat.completion"},
            "choices": a_list(
                an_object(
                    {
                        "index": _COUNT,
                        "message": an_object({"role": {"const": "assistant"}, "content": or_null(_TEXT)}),
                        "logprobs": _CHAT_LOGPROBS,
                        "finish_reason": _FINISH,
                    },
                    {"stop_reason": _STOP_REASON, "token_ids": or_null(_IDS)},
                )
            ),
            "usage": named("Usage"),
        },
        {"metrics": named("Metrics"), **_SCORED},
    ),
    "ChatCompletionChunk": an_object(
        {
            **_HEAD,
            "object": {"const": "chat.completion.chunk"},
            "choices": a_list(
                an_object(
                    {"index": _COUNT, "delta": an_object({}, {"role": _TEXT, "content": or_null(_TEXT)})},
                    {"logprobs": _CHAT_LOGPROBS, "finish_reason": _FINISH, "stop_reason": _STOP_REASON},
                )
            ),
        },
        {"usage": or_null(named("Usage")), "metrics": named("Metrics"), **_SCORED},
    ),
    "Completion": an_object(
        {
            **_HEAD,
            "object": {"const": "text_completion"},
            "choices": a_list(
                an_object(
                    {"index": _COUNT, "text": _TEXT, "logprobs": _COMPLETION_LOGPROBS, "finish_reason": _FINISH},
                    {"stop_reason": _STOP_REASON, "token_ids": or_null(_IDS), **_SCORED},
                )
            ),
        },
        {"usage": or_null(named("Usage")), "metrics": named("Metrics")},
    ),
    "Model": an_object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _TEXT,
            "root": _TEXT,
            "parent": or_null(_TEXT),
            "max_model_len": _COUNT,
            "permission": a_list(_PERMISSION),
        }
    ),
    "ModelList": an_object({"object": {"const": "list"}, "data": a_list(named("Model"))}),
    "Aborted": an_object({"aborted": a_list(_TEXT)}, {"silent_front_ends": _COUNT}),
    "Tokens": an_object(
        {"count": _COUNT, "max_model_len": _COUNT, "tokens": _IDS, "token_strs": or_null(a_list(_TEXT))}
    ),
    "DetokenizedPrompt": an_object({"prompt": _TEXT}),
    "TokenizerInfo": an_object({"tokenizer_class": _TEXT}, {"chat_template": or_null(_TEXT)}),
    "Health": an_object({"status": {"enum": ["ok", "failing"]}}, {"failed_steps": _COUNT, "reasons": a_list(_TEXT)}),
    "Readiness": an_object({"phase": _TEXT, "error": or_null(_TEXT)}),
    "Load": an_object({"server_load": _COUNT}),
    "Version": an_object({"version": _TEXT}),
    "RootPage": an_object(
        {"name": _TEXT, "what": _TEXT, "version": _TEXT, "links": {"type": "object"}}, {"model": _TEXT}
    ),
    "Page": {"type": "object"},
}
