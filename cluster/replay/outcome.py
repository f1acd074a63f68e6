"""What a replay gives: counts and times, gathered step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.replay.schedule import ReplayStep


@dataclass(slots=True)
class ReplayCounts:
    """Counts of decode steps (or of those with prompts), in distinct experts of a layer and step.

    timely: resident when the gate chose them. late: on their way. missed: neither. stall_s: compute waited for them.
    """

    uses: int = 0
    timely: int = 0
    late: int = 0
    missed: int = 0
    stall_s: float = 0.0


@dataclass(slots=True)
class ReplayOutcome:
    """token_s: time of the step of every decoded token. ttft_s: from joining to the first token.

    decode_chunks: sent during decode steps, prefetch included.
    """

    decode: ReplayCounts = field(default_factory=ReplayCounts)
    prefill: ReplayCounts = field(default_factory=ReplayCounts)
    num_tokens: int = 0
    total_s: float = 0.0
    token_s: list[float] = field(default_factory=list[float])
    ttft_s: list[float] = field(default_factory=list[float])
    demand_chunks: int = 0
    prefetch_chunks: int = 0
    decode_chunks: int = 0
    dropped_chunks: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    num_resident: int = 0


class StepLedger:
    """Books the time of every step to the tokens and requests in it."""

    def __init__(self, outcome: ReplayOutcome) -> None:
        self._outcome = outcome
        self._waiting: dict[int, float] = {}

    def add(self, step: ReplayStep, took_s: float, num_chunks: int) -> None:
        """A step took `took_s`; the link began `num_chunks` in it."""
        outcome = self._outcome
        for sequence, decodes in zip(step.signal.sequences, step.decodes, strict=True):
            if decodes:
                outcome.token_s.append(took_s)
                if sequence in self._waiting:
                    outcome.ttft_s.append(self._waiting.pop(sequence))
            else:
                self._waiting[sequence] = self._waiting.get(sequence, 0.0) + took_s
        outcome.total_s += took_s
        outcome.num_tokens += step.num_tokens
        if step.is_decode:
            outcome.decode_chunks += num_chunks
        for sequence in step.ended:
            if sequence in self._waiting:
                outcome.ttft_s.append(self._waiting.pop(sequence))
