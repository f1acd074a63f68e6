"""The engine: schedule, run, sample, one step at a time. Synchronous; one thread drives it.

Knows sequences and steps; knows nothing of clients, text or Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from actors.engine.batcher import Batcher, ScheduledRows
from actors.engine.isolation import execute, together_or_alone
from actors.engine.logits import score_tokens
from actors.engine.sampling import sample
from actors.engine.sequence import Sequence, SequenceState
from actors.engine.step_times import StepTimes
from actors.engine.unsound import sound_logits
from cluster.errors import InvalidOutput, InvalidRequest, MoesaicError
from cluster.types import FinishReason, GenerationRequest, RequestId, TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engine.model_runner import ModelRunner  # imports transformers: seconds that a fake runner need not wait
    from actors.gates.activation_recorder import ActivationRecorder
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
    queued_s: float = 0.0


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
        sequence = Sequence(request, arrived_s=time.perf_counter())
        self.batcher.add(sequence)
        if self._recorder is not None:
            sequence.cluster = self._recorder.take_in(request.embedding)
        self._sequences[request.request_id] = sequence
        if not request.emitted_ids:  # what another worker began was counted there
            self.counters.prompt_tokens += len(request.prompt_ids)

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """Tell kinds of prompts apart by this from the next step on, also those under way.

        Raises:
            ValueError: it is not finite; the last one stays.
        """
        if not knowledge.is_finite:
            raise ValueError(f"knowledge of version {knowledge.version} has numbers that are not finite")
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
        """Compute one step; a token for every sequence whose last pending row was in it, an error for each that fails.

        What goes wrong with one sequence ends that one; the others have what they would have had without it.
        """
        planned = self.batcher.plan()
        if not planned:
            return []
        began_s = time.perf_counter()
        for sequence in (rows.sequence for rows in planned):
            if sequence.queued_s is None:
                sequence.queued_s = began_s - sequence.arrived_s
        done = execute(self.runner, planned)
        failures, logits_RV = done.failures, done.logits_RV
        sampling: list[tuple[ScheduledRows, int]] = []  # with the row of its logits
        if logits_RV is not None:
            self.counters.steps += 1
            num_rows, num_decode = sum(rows.num_rows for rows in done.rows), sum(rows.decodes for rows in done.rows)
            self.times.note(num_decode, num_rows - num_decode, time.perf_counter() - began_s)
            failures |= self._look_at(done.rows, logits_RV)
            stops = accumulate(rows.num_logits for rows in done.rows)
            for rows, stop in zip(done.rows, list(stops), strict=True):
                if rows.sequence.request.request_id not in failures:
                    if rows.samples:
                        sampling.append((rows, stop - 1))
                    self.batcher.on_computed(rows)
        outputs = [self._fail(request_id, error) for request_id, error in failures.items()]
        return outputs if logits_RV is None or not sampling else outputs + self._sample(sampling, logits_RV)

    def _look_at(self, computed: Seq[ScheduledRows], logits_RV: Tensor) -> dict[RequestId, MoesaicError]:
        """Score the prompt tokens whose rows were computed; who cannot go on, because its logits are not finite."""
        failures: dict[RequestId, MoesaicError] = {}
        is_sound = sound_logits(logits_RV).tolist()
        start = 0
        for rows in computed:
            request_id, stop = rows.sequence.request.request_id, start + rows.num_logits
            if not all(is_sound[start:stop]):
                failures[request_id] = self.runner.explain(rows)
            elif rows.sequence.needs_prompt_logits:
                of_rows = partial(_prompt_scores, logits_RV[start:stop])
                (scores,) = together_or_alone(
                    (rows,), lambda alone, score=of_rows: [score(alone[0])], "scoring the prompt"
                )
                if isinstance(scores, MoesaicError):
                    failures[request_id] = scores
                else:
                    rows.sequence.prompt_logprobs += scores
            start = stop
        return failures

    def _sample(self, sampling: Seq[tuple[ScheduledRows, int]], logits_RV: Tensor) -> list[StepOutput]:
        """Args: sampling: who gets a token, with the row of its logits."""
        is_all = len(sampling) == len(logits_RV)

        def draw(some: Seq[tuple[ScheduledRows, int]]) -> list[tuple[int, TokenLogprob | None]]:
            rows = logits_RV if is_all and some is sampling else logits_RV[[row for _, row in some]]
            return self._draw([each.sequence for each, _ in some], rows)

        outputs: list[StepOutput] = []
        for (rows, _), drawn in zip(sampling, together_or_alone(sampling, draw, "sampling"), strict=True):
            sequence = rows.sequence
            if isinstance(drawn, MoesaicError):
                outputs.append(self._fail(sequence.request.request_id, drawn))
            else:
                outputs.append(self._take(sequence, *drawn))
        return outputs

    def _draw(self, sequences: Seq[Sequence], logits_RV: Tensor) -> list[tuple[int, TokenLogprob | None]]:
        params = [s.request.sampling for s in sequences]
        keys = [(s.request.choice, s.num_generated) for s in sequences]
        banned = [s.banned(self._eos) for s in sequences]
        tokens, logprobs = sample(
            logits_RV,
            params,
            keys,
            banned,
            [s.counts for s in sequences],
            self._sampling_kernel,
            [s.rules for s in sequences],
        )
        return list(zip(tokens, logprobs, strict=True))

    def _take(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> StepOutput:
        """The sequence has its next token."""
        request_id = sequence.request.request_id
        prompt_logprobs = tuple(sequence.prompt_logprobs) if sequence.needs_prompt_logits else None
        sequence.append(token)
        reason = self._finish_reason(sequence, token)
        if reason is not None:
            self.abort(request_id)
        if sequence.num_generated == 1:
            self.counters.cached_prompt_tokens += sequence.num_cached or 0
        self.counters.generated_tokens += 1
        cached, queued_s = sequence.num_cached or 0, sequence.queued_s or 0.0
        return StepOutput(request_id, token, logprob, reason, cached, prompt_logprobs, queued_s=queued_s)

    def _fail(self, request_id: RequestId, error: MoesaicError) -> StepOutput:
        """The sequence is over. What one that is not finite has left in the KV cache is nobody's prefix."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and isinstance(error, InvalidOutput):
            self.batcher.blocks.unpublish(sequence.blocks)
        self.abort(request_id)
        return StepOutput(request_id, -1, None, None, 0, error=error)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        p = sequence.request.sampling
        if sequence.state is not SequenceState.RUNNING:
            return None
        if token in p.stop_token_ids or (not p.ignore_eos and token in self._eos):
            return FinishReason.STOP
        if sequence.num_generated >= p.max_tokens or len(sequence.tokens) >= self.max_model_len:
            return FinishReason.LENGTH
        return None


def _prompt_scores(logits_TV: Tensor, rows: ScheduledRows) -> list[TokenLogprob]:
    """The log-probabilities of the prompt tokens that these rows' logits tell of. Args: logits_TV: of these rows."""
    sequence = rows.sequence
    first = sequence.computed + 1  # a row's logits tell of the token after it
    following = sequence.tokens[first : first + rows.num_rows]
    return score_tokens(logits_TV[: len(following)], following, sequence.request.sampling.num_prompt_logprobs or 0)
