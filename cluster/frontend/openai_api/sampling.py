"""Sampling fields that chat and text completions share: OpenAI's and, beyond them, vLLM's.

Knows JSON fields and their bounds; knows no endpoint. Every refusal is an `InvalidRequest` that names the field.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from cluster.errors import InvalidRequest
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.http.request_id import MAX_ID_CHARS
from cluster.frontend.openai_api.request_fields import ClientModel
from cluster.frontend.openai_api.unsupported import asks_for_nothing

MAX_CHOICES = 128
_MAX_STOP_CHARS = 1024
_MAX_BIAS = 100.0


def _stop_list(stop: object) -> object:
    """None, one stop string or a list of them, as a list."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(entry, str) for entry in cast("list[object]", stops)):
        raise ValueError("stop must be a string or a list of strings")
    entries = cast("list[str]", stops)
    if any(not 0 < len(entry) <= _MAX_STOP_CHARS for entry in entries):
        raise ValueError(f"stop strings must have 1 to {_MAX_STOP_CHARS} characters")
    return entries


def _bias_by_token(bias: object) -> object:
    """JSON knows string keys only: token ids as decimal strings, as numbers."""
    if bias is None:
        return {}
    if not isinstance(bias, dict):
        raise ValueError("logit_bias must be an object of token ids")
    by_token: dict[int, float] = {}
    for key, value in cast("dict[str, object]", bias).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 18):
            raise ValueError("the keys of logit_bias must be token ids")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_BIAS <= value <= _MAX_BIAS:
            raise ValueError(f"the values of logit_bias must be numbers from -{_MAX_BIAS:g} to {_MAX_BIAS:g}")
        by_token[int(key)] = float(value)
    return by_token


class StreamOptions(ClientModel):
    """What a stream carries besides tokens."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class KnownFields(ClientModel):
    """A body in which fields that are known and not implemented may ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _without_unsupported(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        fields = cast("dict[str, object]", body)
        return {
            name: value
            for name, value in fields.items()
            if name in cls.model_fields or not asks_for_nothing(name, value)
        }


class SamplingFields(KnownFields):
    """What chat and text completions have in common."""

    model: str | None = None
    request_id: str | None = Field(None, max_length=MAX_ID_CHARS)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias_by_token)] = Field(default_factory=dict[int, float])
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    bad_words: list[Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]] | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop: Annotated[list[str], BeforeValidator(_stop_list)] = Field(default_factory=list[str])
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: int | None = Field(None, ge=-1)
    logprob_token_ids: list[int] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs is only allowed when stream is false", param="prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            message = "truncate_prompt_tokens must be -1 (what there is room for) or at least 1"
            raise InvalidRequest(message, param="truncate_prompt_tokens")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has the usage so far; only for who wants it at the end too, as in vLLM."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(
        self, *, max_tokens: int | None, num_logprobs: int | None, num_prompt_logprobs: int | None
    ) -> SamplingOptions:
        """These fields in our types; what was left out or null stays open."""
        return SamplingOptions(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            seed=self.seed,
            min_tokens=self.min_tokens or 0,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            num_logprobs=num_logprobs,
            n=self.n or 1,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
            num_prompt_logprobs=num_prompt_logprobs,
            logprob_token_ids=tuple(self.logprob_token_ids or ()),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side or "left",
        )
