"""The identity rule for sampled answers: the same seeds draw the same tokens, or an edge explains why not.

A draw is a uniform number that falls between two edges, the running sums of the tokens' probabilities. Single
precision moves the edges a little when rows are computed in another batch, and on another processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from identity import Case, Reference

from actors.engine.sampling import uniform
from cluster.types import SamplingParams

EDGE = 1e-5
"""Of probability, by how much edges move: some units in the last place of a sum of single-precision exponentials."""


def assert_same_draws(
    reference: Reference,
    cases: Sequence[Case],
    params: Sequence[SamplingParams],
    answers: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
) -> None:
    """Of two runs with the same seeds; one sequence may part where its number is on an edge of the token drawn.

    Args: params: temperature and seed, no filters.
    """
    parted: list[str] = []
    for case, of_case, answer, other in zip(cases, params, answers, others, strict=True):
        index = next((i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b), None)
        if index is not None:
            gap = _distance_to_edge(reference, [*case.prompt_ids, *answer[:index]], of_case, index, answer[index])
            parted.append(f"{case.name}: token {index} is {answer[index]} or {other[index]}, {gap:.1e} from the edge")
            assert gap < EDGE, parted[-1]
    assert len(parted) <= 1, parted


def _distance_to_edge(
    reference: Reference, token_ids: Sequence[int], params: SamplingParams, index: int, token: int
) -> float:
    assert params.seed is not None
    with torch.inference_mode():
        logits = reference.model(torch.tensor([list(token_ids)])).logits[0, -1].double()
    edges = torch.softmax(logits / params.temperature, dim=-1).cumsum(dim=-1)
    low = float(edges[token - 1]) if token else 0.0
    number = uniform(params.seed, 0, index)
    return min(abs(number - low), abs(number - float(edges[token])))
