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


class StartupPhase(StrEnum):
    """What an attention worker is doing; everything before READY is start-up."""

    STARTING = "starting"
    LOADING = "loading dense weights"
    CALIBRATING = "calibrating kernels"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. `num_logprobs` None gives no
    log-probabilities, n gives the chosen token's and those of the n likeliest tokens.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to continue: token ids in, so that any worker can take it (or take it over)."""

    request_id: RequestId
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    choice: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token and of the likeliest ones, under the unscaled logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Tokens that became known together; the last chunk of a sequence carries the finish reason."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMemoryStatus:
    """One process's expert memory, in bytes and counts since start."""

    budget_bytes: int
    resident_bytes: int
    model_expert_bytes: int
    num_experts: int
    num_resident: int
    hits: int
    misses: int
    bytes_read: int
    stall_s: float
    read_mode: str
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What one attention worker says of itself. `degraded` lists what works only in part, in words."""

    worker_id: str
    phase: StartupPhase
    error: str | None
    model: str
    dtype: str
    max_model_len: int
    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    num_preemptions: int
    generated_tokens: int
    prompt_tokens: int
    cached_prompt_tokens: int
    expert_memory: ExpertMemoryStatus | None
    degraded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExperts:
    """Experts of one layer: where they are and how often the gate chose them."""

    layer: int
    resident: tuple[int, ...]
    activations: tuple[int, ...]
    hits: int
    misses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsReport:
    """Residency and activation per layer of one worker's expert memory."""

    worker_id: str
    layers: tuple[LayerExperts, ...]
