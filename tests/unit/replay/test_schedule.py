"""The steps that a trace becomes: who runs together, and what they say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from trace_builders import trace_of

from cluster.replay.schedule import ReplayStep, build_steps


def _sequences(steps: Sequence[ReplayStep]) -> list[tuple[int, ...]]:
    return [step.signal.sequences for step in steps]


def test_next_sequence_joins_when_one_ends() -> None:
    trace = trace_of([[[[0]]] * 2, [[[1]]] * 3, [[[0]], [[1]]]], num_experts=2)

    steps = build_steps(trace, concurrency=2, order=[0, 1, 2])

    assert _sequences(steps) == [(0, 1), (0, 1), (1, 2), (2,)]
    assert [step.ended for step in steps] == [(), (0,), (1,), (2,)]
    assert [step.needed for step in steps] == [((0, 1),), ((0, 1),), ((0, 1),), ((1,),)]


def test_prompt_is_one_step_whose_signals_are_means() -> None:
    trace = trace_of([[[[0]], [[1]], [[0]], [[0]], [[2]]]], num_experts=4, num_prefill=4)

    prompt, token = build_steps(trace, concurrency=1, order=[0])

    np.testing.assert_allclose(prompt.gates[0].probs, [[0.75, 0.25, 0, 0]])
    np.testing.assert_array_equal(prompt.gates[0].counts, [[3, 1, 0, 0]])
    assert prompt.rows == ((3, 1),) and not prompt.is_decode and prompt.num_tokens == 0
    assert token.needed == ((2,),) and token.is_decode and token.num_tokens == 1
