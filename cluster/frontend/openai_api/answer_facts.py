"""What is the same in every part of one answer, and what its client asked for beside the text. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.frontend.generation.sequence import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFacts:
    """What is the same in every part of one answer, and which extras its client asked for.

    `prompts` are the token ids of each prompt; choice i belongs to prompt i // n.
    """

    answer_id: str
    model: str
    fingerprint: str
    created_s: int
    prompts: Sequence[Sequence[int]]
    n: int = 1
    include_usage: bool = False
    continuous_usage: bool = False
    gives_token_ids: bool = False
    names_token_ids: bool = False
    gives_metrics: bool = False

    def head(self, kind: str) -> dict[str, object]:
        """The fields that every JSON object of the answer begins with."""
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def prompt_of(self, index: int) -> Sequence[int]:
        """Token ids of the prompt that choice `index` answers."""
        return self.prompts[index // self.n]

    def total_usage(self, usage_by_choice: Mapping[int, Usage]) -> Usage:
        """Sum over the choices; a prompt counts once, whatever the number of its choices."""
        firsts = [usage for index, usage in usage_by_choice.items() if index % self.n == 0]
        return Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
            completion_tokens=sum(usage.completion_tokens for usage in usage_by_choice.values()),
            cached_tokens=sum(usage.cached_tokens for usage in firsts),
            times=next(iter(usage_by_choice.values())).times if len(usage_by_choice) == 1 else None,
        )

    def metrics(self, usage: Usage) -> dict[str, object]:
        """vLLM's `metrics` of an answer with one choice, where they are given: milliseconds, and tokens a second."""
        times, num_tokens = usage.times, usage.completion_tokens
        if not self.gives_metrics or times is None:
            return {}
        told = {
            "time_to_first_token_ms": times.first_token_s * 1e3,
            "generation_time_ms": times.generation_s * 1e3,
            "queue_time_ms": times.queued_s * 1e3,
        }
        if num_tokens > 1:
            told["mean_itl_ms"] = times.generation_s * 1e3 / (num_tokens - 1)
        if (computed_s := times.first_token_s + times.generation_s) > 0:
            told["tokens_per_second"] = num_tokens / computed_s
        return {"metrics": told}
