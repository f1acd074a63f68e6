"""Request bodies of the OpenAI API: what is accepted, within which bounds, and what it means in our types.

Knows JSON fields; knows no model, no tokens and no HTTP. Every refusal is an `InvalidRequest` that names the field.
"""

from __future__ import annotations

from typing import Annotated, Self, cast

from pydantic import BeforeValidator, Field, model_validator

from cluster.errors import InvalidRequest
from cluster.frontend.generation.chat_messages import ConversationFields, Message
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.openai_api.request_fields import ClientModel, StrictModel
from cluster.frontend.openai_api.sampling import MAX_CHOICES, SamplingFields

_MAX_PROMPTS = 128
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


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


class ChatRequest(SamplingFields, ConversationFields):
    """Body of /v1/chat/completions. `echo` begins the answer with the text of the message that it continues."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1)
    echo: bool | None = None
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def _has_logprobs_for_top(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        return self

    @property
    def echoed(self) -> str:
        """What the answer begins with."""
        last = self.messages[-1]
        return (last.content or "") if self.echo and last.role == "assistant" else ""

    def options(self) -> SamplingOptions:
        """How to sample; without a limit the answer may fill the context."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling(
            max_tokens=limit,
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            num_prompt_logprobs=self.prompt_logprobs,
        )


class CompletionRequest(SamplingFields):
    """Body of /v1/completions; each prompt becomes `n` choices."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompt_list)]
    logprobs: int | None = Field(None, ge=-1)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        n = self.n or 1
        if self.best_of not in (None, n):
            message = f"best_of other than n is not supported by this server (got {self.best_of}, n is {n})"
            raise InvalidRequest(message, param="best_of")
        if n * len(self.prompt) > MAX_CHOICES:
            message = f"at most {MAX_CHOICES} choices per request are allowed, got {len(self.prompt)} prompts times {n}"
            raise InvalidRequest(message, param="n")
        return self

    def options(self) -> SamplingOptions:
        """How to sample; without a limit OpenAI's default of 16 tokens holds."""
        limit = _COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        scored = self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs
        if self.echo and limit == 0 and scored is None:
            scored = 0  # an answer of nothing but its prompt needs a reason to be asked for
        return self.sampling(
            max_tokens=limit,
            num_logprobs=self.logprobs,
            num_prompt_logprobs=scored,
        )


class TokenizeRequest(ConversationFields):
    """Body of /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _has_one_of_both(self) -> Self:
        if (self.prompt is None) is (self.messages is None):
            raise InvalidRequest("exactly one of prompt and messages is needed", param="prompt")
        return self


class DetokenizeRequest(ClientModel):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]


class AbortRequest(StrictModel):
    """Body of /abort_requests: ids of answers, or request ids that clients sent."""

    request_ids: list[str] = Field(min_length=1, max_length=1024)


class ExpertCacheBody(StrictModel):
    """Body of /experts/cache: bytes, or percent of the routed-expert bytes."""

    cache: str = Field(min_length=1, max_length=64)
