"""What a client asked for, checked against the model and turned into what an engine does.

Knows token ids and text; knows no worker. Every refusal names the field.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from cluster.config.sections import FrontendConfig
from cluster.errors import ContextTooLong, InvalidRequest
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.model.generation_config import SamplingDefaults
from cluster.model.info import ModelInfo
from cluster.types import SamplingParams

LIMITED = ("allowed_token_ids", "logit_bias", "bad_words", "stop", "stop_token_ids", "logprob_token_ids")

_CONTEXT_CODE = "context_length_exceeded"
_MAX_BIAS = 100.0
_BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def resolve_sampling(
    options: SamplingOptions,
    *,
    tokenizer: Tokenizer,
    info: ModelInfo,
    num_prompt: int,
    prompt_param: str,
    max_logprobs: int,
    logprobs_param: str = "num_logprobs",
) -> SamplingParams:
    """Parameters of one sequence, with what the client left open filled in.

    Args: max_logprobs: the most that are given at one position. logprobs_param: what errors call `num_logprobs`.
    Raises:
        InvalidRequest: a value out of bounds, a token id outside the vocabulary, or fields that contradict each other.
        ContextTooLong: the prompt, or the prompt plus max_tokens, exceeds the context; gives both numbers.
    """
    _check_bounds(options)
    limit = info.vocab_size or tokenizer.vocab_size
    check_token_ids(options.stop_token_ids, limit, "stop_token_ids")
    check_token_ids(options.allowed_token_ids, limit, "allowed_token_ids")
    check_token_ids([token_id for token_id, _ in options.logit_bias], limit, "logit_bias")
    check_token_ids(options.logprob_token_ids, limit, "logprob_token_ids")
    if options.logprob_token_ids and options.num_logprobs is None:
        raise InvalidRequest("logprob_token_ids is only allowed with logprobs", param="logprob_token_ids")
    bound = min(max_logprobs, limit)
    num_logprobs = _num_logprobs(options.num_logprobs, bound, max_logprobs, logprobs_param)
    if options.num_prompt_logprobs == -1 and bound < limit:
        message = f"prompt_logprobs of -1 asks for all {limit} tokens at every place, at most {max_logprobs} are given"
        raise InvalidRequest(f"{message} (frontend.max_logprobs)", param="prompt_logprobs")
    num_prompt_logprobs = _num_logprobs(options.num_prompt_logprobs, bound, max_logprobs, "prompt_logprobs")
    chosen = _chosen(options, info.sampling)
    max_tokens = _max_tokens(info, num_prompt, options, prompt_param)
    if options.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens ({options.min_tokens}) exceeds the tokens that can be generated ({max_tokens})",
            param="min_tokens",
        )
    bad_words = _bad_words(options.bad_words, tokenizer)
    ends = (*info.eos_token_ids, *options.stop_token_ids) if options.min_tokens else ()
    allowed = options.allowed_token_ids
    if allowed and not set(allowed).difference(ends, (word[-1] for word in bad_words)):
        raise InvalidRequest(
            f"allowed_token_ids leaves no token to choose: bad_words or min_tokens forbid all {len(allowed)}",
            param="allowed_token_ids",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if options.seed is None else options.seed % 2**63,
        min_tokens=options.min_tokens,
        stop=options.stop,
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
        num_logprobs=num_logprobs,
        logit_bias=options.logit_bias,
        allowed_token_ids=allowed,
        bad_words=bad_words,
        num_prompt_logprobs=num_prompt_logprobs,
        logprob_token_ids=options.logprob_token_ids,
        include_stop_str_in_output=options.include_stop_str_in_output,
        skip_special_tokens=options.skip_special_tokens,
        **chosen,
    )


def check_lengths(options: SamplingOptions, config: FrontendConfig) -> None:
    """Return if no list of the request is longer than the server takes. Before anything is done with them.

    Raises:
        InvalidRequest: one is; gives its length and the limit.
    """
    for name in LIMITED:
        number, limit = len(getattr(options, name)), int(getattr(config, f"max_{name}"))
        if number > limit:
            raise InvalidRequest(
                f"{name} has {number} entries, at most {limit} are allowed (frontend.max_{name} of the server)",
                param=name,
            )


def truncated_prompt(prompt_ids: Sequence[int], options: SamplingOptions, max_model_len: int) -> Sequence[int]:
    """The part of the prompt that `truncate_prompt_tokens` keeps: its end, or its beginning where the right is cut.

    Raises:
        ContextTooLong: max_tokens leaves no room for a prompt.
    """
    keep = options.truncate_prompt_tokens
    if keep is None:
        return prompt_ids
    if keep == -1:
        keep = max_model_len - (options.max_tokens or 1)
        if keep < 1:
            raise ContextTooLong(
                f"this model's maximum context length is {max_model_len} tokens; max_tokens ({options.max_tokens}) "
                "leaves none for the prompt",
                param="max_tokens",
                code=_CONTEXT_CODE,
            )
    return prompt_ids[:keep] if options.truncation_side == "right" else prompt_ids[-keep:]


def check_token_ids(ids: Sequence[int], limit: int, param: str) -> None:
    """Return if all `ids` are below `limit`, the size of the vocabulary.

    Raises:
        InvalidRequest: one is not; names it.
    """
    if ids and not (min(ids) >= 0 and max(ids) < limit):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < limit)
        raise InvalidRequest(f"token id {wrong} is out of vocabulary, which has {limit} tokens", param=param)


def _chosen(options: SamplingOptions, defaults: SamplingDefaults) -> dict[str, Any]:
    """What the request says of the distribution, else the model's author; what neither says stays out."""
    names = (field.name for field in fields(SamplingDefaults) if field.name != "max_tokens")
    asked = {name: getattr(options, name) for name in names}
    return {
        name: value
        for name, asked_value in asked.items()
        if (value := getattr(defaults, name) if asked_value is None else asked_value) is not None
    }


def _check_bounds(options: SamplingOptions) -> None:
    """The HTTP face has checked these already; other faces and the command line have not."""
    for name, (low, high) in _BOUNDS.items():
        value: float | None = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise InvalidRequest(f"{name} must be from {low:g} to {high:g}, got {value}", param=name)
    if options.top_p is not None and not options.top_p > 0:
        raise InvalidRequest(f"top_p must be above 0, got {options.top_p}", param="top_p")
    if options.repetition_penalty is not None and not 0 < options.repetition_penalty < math.inf:
        message = f"repetition_penalty must be above 0, got {options.repetition_penalty}"
        raise InvalidRequest(message, param="repetition_penalty")
    if not all(-_MAX_BIAS <= value <= _MAX_BIAS for _, value in options.logit_bias):
        raise InvalidRequest(f"logit_bias must be from -{_MAX_BIAS:g} to {_MAX_BIAS:g}", param="logit_bias")


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences of each word, at the beginning of a text and, where it is another token, after a space.

    Source: vLLM's SamplingParams.update_from_tokenizer.
    """
    sequences: list[tuple[int, ...]] = []
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not bare:
            raise InvalidRequest(f"bad_words: {word[:100]!r} has no tokens", param="bad_words")
        spaced = tuple(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
        sequences.append(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            sequences.append(spaced)
    return tuple(sequences)


def _num_logprobs(asked: int | None, bound: int, max_logprobs: int, param: str) -> int | None:
    """How many are given: all that may be for -1."""
    if asked == -1:
        return bound
    if asked is not None and not 0 <= asked <= max_logprobs:
        bounds = f"from 0 to {max_logprobs} (frontend.max_logprobs), or -1 for as many as there are"
        raise InvalidRequest(f"{param} must be {bounds}, got {asked}", param=param)
    return asked


def _max_tokens(info: ModelInfo, num_prompt: int, options: SamplingOptions, prompt_param: str) -> int:
    """The limit of the answer, at least one token: where none is shown, a worker gives one all the same."""
    context, max_tokens = info.max_model_len, options.max_tokens
    too_long = f"this model's maximum context length is {context} tokens, but "
    if num_prompt >= context:
        raise ContextTooLong(
            f"{too_long}the prompt has {num_prompt} tokens; at most {context - 1} leave room for an answer",
            param=prompt_param,
            code=_CONTEXT_CODE,
        )
    if max_tokens is None:
        return min(context - num_prompt, info.sampling.max_tokens or context)
    if max_tokens == 0 and (options.min_tokens or options.logprob_token_ids):
        param = "min_tokens" if options.min_tokens else "logprob_token_ids"
        raise InvalidRequest(f"{param} concerns tokens that max_tokens 0 does not generate", param=param)
    if max_tokens == 0 and options.num_prompt_logprobs is not None:
        return 1
    if max_tokens < 1:
        message = f"max_tokens must be at least 1, got {max_tokens}; 0 only scores a prompt (echo or prompt_logprobs)"
        raise InvalidRequest(message, param="max_tokens")
    if num_prompt + max_tokens > context:
        raise ContextTooLong(
            f"{too_long}{num_prompt + max_tokens} were requested ({num_prompt} in the prompt, {max_tokens} in the "
            "completion); shorten the prompt or lower max_tokens",
            param="max_tokens",
            code=_CONTEXT_CODE,
        )
    return max_tokens
