"""Request bodies of the OpenAI API: what is accepted, within which bounds, and what it means in our types.

Knows JSON fields; knows no model, no tokens and no HTTP. Every refusal is an `InvalidRequest` that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar, cast

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import InvalidRequest
from cluster.frontend.openai_unsupported import MAX_ECHO_CHARS, asks_for_nothing, echo
from cluster.frontend.sequence import SamplingOptions

_MAX_ERRORS = 10
_MAX_PROMPTS = 128
_MAX_STOPS = 16
_MAX_STOP_CHARS = 1024
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


class _Strict(BaseModel):
    """No coercion (the string "5" is no number) and no unknown names."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


def _joined_text(content: object) -> object:
    """A list of text parts as one string; templates of text models know strings only."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in cast("list[object]", content):
        fields: dict[str, object] = cast("dict[str, object]", part) if isinstance(part, dict) else {}
        text = fields.get("text")
        if fields.get("type") != "text" or not isinstance(text, str):
            raise ValueError("content parts must be of type 'text' with a string 'text'; this model reads text only")
        texts.append(text)
    return "\n".join(texts)


def _stop_list(stop: object) -> object:
    """None, one stop string or a list of them, as a list."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(entry, str) for entry in cast("list[object]", stops)):
        raise ValueError("stop must be a string or a list of strings")
    entries = cast("list[str]", stops)
    if len(entries) > _MAX_STOPS:
        raise ValueError(f"at most {_MAX_STOPS} stop strings are allowed, got {len(entries)}")
    if any(not 0 < len(entry) <= _MAX_STOP_CHARS for entry in entries):
        raise ValueError(f"stop strings must have 1 to {_MAX_STOP_CHARS} characters")
    return entries


def _prompt_list(prompt: object) -> object:
    """A string, strings, token ids or lists of token ids, as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    prompts = cast("list[object]", prompt) if isinstance(prompt, list) else []
    if not prompts:
        raise ValueError("prompt must be a string, a list of strings, a list of token ids or a list of such lists")
    if _are_token_ids(prompts):
        return [prompts]
    if len(prompts) > _MAX_PROMPTS:
        raise ValueError(f"at most {_MAX_PROMPTS} prompts per request are allowed, got {len(prompts)}")
    if all(isinstance(entry, str) for entry in prompts) or all(_are_token_ids(entry) for entry in prompts):
        return prompts
    raise ValueError("prompt must hold only strings, only token ids or only lists of token ids")


def _are_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in cast("list[object]", value))


class StreamOptions(_Strict):
    """What a stream carries besides tokens."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Message(_Strict):
    """One chat message. What the openai client adds to an answer it sends back is accepted and not used."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_joined_text)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content")
        return self

    def for_template(self) -> dict[str, object]:
        """The fields that chat templates know. `developer` is the newer word for `system`."""
        fields = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
        }
        present: dict[str, object] = {name: value for name, value in fields.items() if value}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content or "", **present}


class _SamplingFields(_Strict):
    """What chat and text completions have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    min_tokens: int | None = Field(None, ge=0)
    stop: Annotated[list[str], BeforeValidator(_stop_list)] = []
    stop_token_ids: list[int] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, body: object) -> object:
        if not isinstance(body, dict):
            raise InvalidRequest("the request body must be a JSON object")
        return {
            name: value
            for name, value in cast("dict[str, object]", body).items()
            if name in cls.model_fields or not asks_for_nothing(name, value)
        }

    @model_validator(mode="after")
    def _has_stream_for_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, max_tokens: int | None, num_logprobs: int | None) -> SamplingOptions:
        """These fields in our types; what was left out or null has its default."""
        return SamplingOptions(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(self.top_k or 0, 0),
            min_p=float(self.min_p or 0.0),
            seed=self.seed,
            min_tokens=self.min_tokens or 0,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            num_logprobs=num_logprobs,
        )


class ChatRequest(_SamplingFields):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_logprobs_for_top(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        return self

    def options(self) -> SamplingOptions:
        """How to sample; without a limit the answer may fill the context."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling(max_tokens=limit, num_logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(_SamplingFields):
    """Body of /v1/completions; each prompt becomes one choice."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompt_list)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def _has_no_prompt_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("echo together with logprobs is not supported", param="echo")
        return self

    def options(self) -> SamplingOptions:
        """How to sample; without a limit OpenAI's default of 16 tokens holds."""
        limit = _COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling(max_tokens=limit, num_logprobs=self.logprobs)


Body = TypeVar("Body", ChatRequest, CompletionRequest)


def parse_body(schema: type[Body], body: bytes) -> Body:
    """Read a request body.

    Raises:
        InvalidRequest: not UTF-8, not JSON, or not as `schema` wants it; the message is bounded in size.
    """
    try:
        body.decode()
        return schema.model_validate(orjson.loads(body))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the request body is not valid UTF-8 (byte {error.start})") from None
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}"[:MAX_ECHO_CHARS]) from None
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        message = "; ".join(_explain(detail) for detail in details[:_MAX_ERRORS])
        if len(details) > _MAX_ERRORS:
            message += f"; and {len(details) - _MAX_ERRORS} more"
        raise InvalidRequest(message, param=_path(details[0]["loc"]) or None) from None


def _explain(detail: Mapping[str, Any]) -> str:
    path = _path(detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"Unrecognized request argument supplied: {path}"
        case "missing":
            return f"Missing required parameter: '{path}'"
        case _:
            reason = str(detail["msg"]).removeprefix("Value error, ")
            return f"{path}: {reason} (got {echo(detail['input'])})"


def _path(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location)[:MAX_ECHO_CHARS]
