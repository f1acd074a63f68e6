"""Frozen value types shared by every part. Knows nothing of transport, devices or storage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType

RequestId = NewType("RequestId", str)


class ExpertId(NamedTuple):
    """One expert of the model: its decoder layer and its index in that layer's gate.

    A tuple, because it is hashed hundreds of times a step.
    """

    layer: int
    expert: int


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Tier(StrEnum):
    """Memories an expert can be in, fastest first. RAM: of the same process; REMOTE: of another node."""

    DEVICE = "device"
    RAM = "ram"
    REMOTE = "remote"
    DISK = "disk"


class Phase(StrEnum):
    """What a token row of a step does: PREFILL takes a prompt in, DECODE continues a sequence by one token."""

    PREFILL = "prefill"
    DECODE = "decode"


class StartupPhase(StrEnum):
    """What an attention worker or expert host is doing; everything before READY is start-up."""

    STARTING = "starting"
    LOADING = "loading dense weights"
    CALIBRATING = "calibrating kernels"
    CONNECTING = "connecting to expert hosts"
    WARMING_UP = "fetching the experts used most"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. `num_logprobs` None gives no
    log-probabilities, n gives the chosen token's and those of the n likeliest tokens; `num_prompt_logprobs`
    the same for the tokens of the prompt. With `logprob_token_ids` those are given, and the chosen one's, instead of
    the likeliest ones'.

    presence_penalty and frequency_penalty count generated tokens, repetition_penalty also those of the prompt
    (vLLM's and transformers' rule: positive logits are divided by it, negative ones multiplied). `allowed_token_ids`
    empty allows all. `bad_words` are token sequences whose last token is not drawn after the others.
    `include_stop_str_in_output` and `skip_special_tokens` concern the text alone.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on which tokens came before."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to continue: token ids in, so that any worker can take it (or take it over).

    embedding: what the prompt means, int8 (cluster/semantics), empty where nobody asks. emitted_ids: tokens that
    earlier attempts gave; the next one follows them. avoid: ids of Serve replicas that lost it. only_scores: the prompt
    is what matters, and the one token that a worker gives is not shown.
    """

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    choice: int = 0
    embedding: bytes = b""
    emitted_ids: tuple[int, ...] = ()
    attempt: int = 0
    avoid: tuple[str, ...] = ()
    only_scores: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token and of the likeliest ones, under the unscaled logits.

    `rank` of the chosen token, 1 for the likeliest, is known for prompt tokens only.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Tokens that became known together; the last chunk of a sequence carries the finish reason.

    `prompt_logprobs`, where asked for, come once, with the first token: one for each prompt token but the first.
    A chunk without tokens may come first: it tells that the sequence was taken. `queued_s`: seconds that the sequence
    waited in its worker until its first rows were computed.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    queued_s: float = 0.0
