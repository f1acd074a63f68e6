"""What a request's parameters do to its logits before a token is drawn, and what logits say of given tokens.

Knows rows of logits; knows nothing of steps. Order of effects as in vLLM: tokens that are not allowed, banned tokens,
logit bias, penalties; temperature and the filters of the distribution come later, in `sampling.py`.

Shapes: R rows that are sampled, T rows of a prompt, V vocabulary, N (row, token) pairs, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from actors.engine.token_counts import TokenCounts
from actors.engine.token_rules import TokenRules
from cluster.types import SamplingParams, TokenLogprob


def shape_logits(
    logits_RV: Tensor,
    params: Seq[SamplingParams],
    banned: Seq[tuple[int, ...]],
    counts: Seq[TokenCounts | None],
    rules: Seq[TokenRules | None] | None = None,
) -> Tensor:
    """The logits that tokens are drawn from. The very same tensor when no row asks for anything.

    Args:
        logits_RV: float32; not changed.
        banned: token ids that may not be chosen now.
        counts: tokens so far of the rows that have penalties.
        rules: prepared from `params`; None: prepared here, which a sequence need not do at every step.
    """
    if rules is None:
        rules = [TokenRules.of(p) for p in params]
    allowed = [(row, r.allowed) for row, r in enumerate(rules) if r is not None and r.allowed is not None]
    biased = [(row, *r.bias) for row, r in enumerate(rules) if r is not None and r.bias is not None]
    penalised = [row for row, c in enumerate(counts) if c is not None]
    if not (allowed or biased or penalised or any(banned)):
        return logits_RV
    shaped_RV = logits_RV.clone()
    for row, allowed_ids in allowed:
        ids = torch.from_numpy(allowed_ids)
        shaped_RV[row] = -torch.inf
        shaped_RV[row, ids] = logits_RV[row, ids]
    for row, forbidden in enumerate(banned):
        if forbidden:
            shaped_RV[row, list(forbidden)] = -torch.inf
    for row, ids, values in biased:
        shaped_RV[row, torch.from_numpy(ids)] += torch.from_numpy(values)
    if penalised:
        _penalise(shaped_RV, params, counts, penalised)
    return shaped_RV


def score_tokens(logits_TV: Tensor, token_ids: Seq[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability and rank of each given token under its row's logits, with the `num_top` likeliest."""
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    ids_T = torch.tensor(token_ids, dtype=torch.int64)
    chosen_T = logprobs_TV.gather(1, ids_T[:, None])[:, 0]
    ranks = (1 + (logprobs_TV > chosen_T[:, None]).sum(dim=-1)).tolist()
    values_TK, top_TK = torch.topk(logprobs_TV, min(num_top, logprobs_TV.shape[1]), dim=-1)
    tops = zip(top_TK.tolist(), values_TK.tolist(), strict=True)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(ids, values, strict=True)), rank)
        for token_id, logprob, (ids, values), rank in zip(token_ids, chosen_T.tolist(), tops, ranks, strict=True)
    ]


def _penalise(logits_RV: Tensor, params: Seq[SamplingParams], counts: Seq[TokenCounts | None], rows: Seq[int]) -> None:
    """Penalise, in place, the tokens that the sequences of `rows` have had; all of them in one gather and one scatter.

    The repetition penalty comes first (CTRL, Keskar et al. 2019), then OpenAI's frequency and presence penalties, which
    concern generated tokens only.
    """
    seen = [c for row in rows if (c := counts[row]) is not None]
    sizes = [len(c.ids) for c in seen]
    row_N = torch.from_numpy(np.repeat(np.asarray(rows, dtype=np.int64), sizes))
    token_N = torch.from_numpy(np.concatenate([c.ids for c in seen]))
    generated_N = torch.from_numpy(np.concatenate([c.generated for c in seen])).float()

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.float32), sizes))

    repetition_N = spread([params[row].repetition_penalty for row in rows])
    frequency_N = spread([params[row].frequency_penalty for row in rows])
    presence_N = spread([params[row].presence_penalty for row in rows])
    values_N = logits_RV[row_N, token_N]
    values_N = torch.where(values_N > 0, values_N / repetition_N, values_N * repetition_N)
    values_N -= frequency_N * generated_N + presence_N * (generated_N > 0)
    logits_RV[row_N, token_N] = values_N
