"""The engine: schedule, run, sample, one step at a time. Synchronous; one thread drives it.

Knows sequences and steps; knows nothing of clients, text or Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.engine.batcher import Batcher, ScheduledRows
from actors.engine.logits import score_tokens
from actors.engine.sampling import sample
from actors.engine.sequence import Sequence, SequenceState
from actors.engine.step import StepFailed
from actors.engine.step_times import StepTimes
from cluster.errors import InvalidRequest, MoesaicError
from cluster.types import FinishReason, GenerationRequest, RequestId, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engine.model_runner import ModelRunner  # imports transformers: seconds that a fake runner need not wait
    from actors.experts.recorder import ActivationRecorder
    from actors.kernels.sampling import SamplingKernel
    from cluster.semantics.knowledge import Knowledge


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one sequence; with an `error` it added nothing, and the sequence is over."""

    request_id: RequestId
    token_id: int
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    num_cached: int
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: MoesaicError | None = None


@dataclass(slots=True)
class EngineCounters:
    """Since start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0


class Engine:
    """Sequences in, tokens out."""

    def __init__(
        self,
        runner: ModelRunner,
        batcher: Batcher,
        *,
        max_model_len: int,
        eos_token_ids: Seq[int],
        recorder: ActivationRecorder | None = None,
        sampling_kernel: SamplingKernel | None = None,
    ) -> None:
        """Args: recorder: tells kinds of prompts apart; None: they are not. sampling_kernel: None: torch draws."""
        self.runner = runner
        self.batcher = batcher
        self.max_model_len = max_model_len
        self.counters = EngineCounters()
        self.times = StepTimes()
        self._recorder = recorder
        self._sampling_kernel = sampling_kernel
        self._eos = tuple(eos_token_ids)
        self._sequences: dict[RequestId, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return not self.batcher.is_idle

    def add(self, request: GenerationRequest) -> None:
        """Queue a sequence.

        Raises:
            Overloaded: the queue is full.
            InvalidRequest: no prompt, or longer than the context; or nothing is left to generate.
        """
        if not request.prompt_ids or len(request.prompt_ids) >= self.max_model_len:
            raise InvalidRequest(
                f"the prompt has {len(request.prompt_ids)} tokens; 1 to {self.max_model_len - 1} are possible"
            )
        room = min(request.sampling.max_tokens, self.max_model_len - len(request.prompt_ids))
        if len(request.emitted_ids) >= room:
            raise InvalidRequest(f"the request has its {len(request.emitted_ids)} tokens already")
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id} is in use")
        sequence = Sequence(request)
        self.batcher.add(sequence)
        if self._recorder is not None:
            sequence.cluster = self._recorder.take_in(request.embedding)
        self._sequences[request.request_id] = sequence
        if not request.emitted_ids:  # what another worker began was counted there
            self.counters.prompt_tokens += len(request.prompt_ids)

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """Tell kinds of prompts apart by this from the next step on, also those under way."""
        if self._recorder is not None:
            self._recorder.set_knowledge(knowledge)
            for sequence in self._sequences.values():
                sequence.cluster = self._recorder.cluster_of(sequence.request.embedding)
        self.batcher.co_batching.set_knowledge(knowledge)

    def abort(self, request_id: RequestId) -> None:
        """Stop a sequence and free its blocks; unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.batcher.finish(sequence)
            self.runner.forget(request_id)
            if self._recorder is not None and self.batcher.is_idle:
                self._recorder.settle()

    def abort_all(self) -> list[RequestId]:
        """Stop everything; the ids stopped."""
        stopped = list(self._sequences)
        for request_id in stopped:
            self.abort(request_id)
        return stopped

    def step(self) -> list[StepOutput]:
        """Compute one step; a token for every sequence whose last pending row was in it."""
        planned = self.batcher.plan()
        if not planned:
            return []
        began_s = time.perf_counter()
        try:
            logits_RV = self.runner.execute(planned)
        except StepFailed as failure:  # nothing of the step counts: the others compute the same rows again
            for request_id in failure.request_ids:
                self.abort(request_id)
            return [StepOutput(i, -1, None, None, 0, error=failure.error) for i in failure.request_ids]
        self.counters.steps += 1
        num_rows, num_decode = sum(rows.num_rows for rows in planned), sum(rows.decodes for rows in planned)
        self.times.note(num_decode, num_rows - num_decode, time.perf_counter() - began_s)
        sampling = [rows for rows in planned if rows.samples]
        if len(logits_RV) > len(sampling):
            logits_RV = _score_prompts(planned, logits_RV)
        for rows in planned:
            self.batcher.on_computed(rows)
        return self._sample(sampling, logits_RV)

    def _sample(self, sampling: list[ScheduledRows], logits_RV: Tensor) -> list[StepOutput]:
        if not sampling:
            return []
        sequences = [rows.sequence for rows in sampling]
        params = [s.request.sampling for s in sequences]
        keys = [(s.request.choice, s.num_generated) for s in sequences]
        banned = [s.banned(self._eos) for s in sequences]
        tokens, logprobs = sample(logits_RV, params, keys, banned, [s.counts for s in sequences], self._sampling_kernel)
        outputs: list[StepOutput] = []
        for sequence, token, logprob in zip(sequences, tokens, logprobs, strict=True):
            prompt_logprobs = tuple(sequence.prompt_logprobs) if sequence.needs_prompt_logits else None
            sequence.append(token)
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self.abort(sequence.request.request_id)
            if sequence.num_generated == 1:
                self.counters.cached_prompt_tokens += sequence.num_cached or 0
            self.counters.generated_tokens += 1
            outputs.append(
                StepOutput(
                    sequence.request.request_id, token, logprob, reason, sequence.num_cached or 0, prompt_logprobs
                )
            )
        return outputs

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        p = sequence.request.sampling
        if sequence.state is not SequenceState.RUNNING:
            return None
        if token in p.stop_token_ids or (not p.ignore_eos and token in self._eos):
            return FinishReason.STOP
        if sequence.num_generated >= p.max_tokens or len(sequence.tokens) >= self.max_model_len:
            return FinishReason.LENGTH
        return None


def _score_prompts(planned: Seq[ScheduledRows], logits_RV: Tensor) -> Tensor:
    """Note the log-probabilities of prompt tokens whose rows were computed; the logits of sampled rows alone."""
    sampled: list[int] = []
    start = 0
    for rows in planned:
        sequence, stop = rows.sequence, start + rows.num_logits
        num_top = sequence.request.sampling.num_prompt_logprobs
        if num_top is not None and sequence.needs_prompt_logits:
            first = sequence.computed + 1  # a row's logits tell of the token after it
            following = sequence.tokens[first : first + rows.num_rows]
            sequence.prompt_logprobs += score_tokens(logits_RV[start : start + len(following)], following, num_top)
        if rows.samples:
            sampled.append(stop - 1)
        start = stop
    return logits_RV[sampled]
