"""Logits to token ids. Knows distributions; knows nothing of batches' composition.

Noise is a counter generator keyed by (seed, choice, token index): a row's draw does not depend on
its batch, its worker or a preemption. One uniform number is inverted through the row's cumulative
distribution, so equal logits give equal tokens.

Shapes: R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from actors.engine.logits import shape_logits
from actors.engine.token_counts import TokenCounts
from actors.engine.token_rules import TokenRules
from actors.kernels.sampling import Draw, SamplingKernel
from cluster.errors import InvalidOutput, InvalidRequest
from cluster.types import SamplingParams, TokenLogprob

_MASK = (1 << 64) - 1


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) that depends on its three keys alone (SplitMix64, Steele et al. 2014)."""
    state = _mix(_mix(_mix(seed & _MASK) ^ (choice & _MASK)) ^ (index & _MASK))
    return (state >> 11) / float(1 << 53)


def sample(
    logits_RV: Tensor,
    params: Seq[SamplingParams],
    keys: Seq[tuple[int, int]],
    banned: Seq[tuple[int, ...]],
    counts: Seq[TokenCounts | None],
    kernel: SamplingKernel | None = None,
    rules: Seq[TokenRules | None] | None = None,
) -> tuple[list[int], list[TokenLogprob | None]]:
    """One token for each row, and its log-probability, as the model alone gives it, where asked for.

    Raises:
        InvalidRequest: a row's parameters leave no token that may come.

    Args:
        logits_RV: any float dtype; rows that can be sampled (unsound.sound_logits).
        keys: (choice, token index) of each row; the seed is in its params.
        banned: token ids that may not be chosen now.
        counts: tokens so far of the rows that have penalties.
        kernel: draws without sorting a row; None: torch does, and takes longer.
        rules: prepared from `params`; None: prepared here.
    """
    raw_RV = logits_RV.float()
    logits_RV = shape_logits(raw_RV, params, banned, counts, rules)
    if logits_RV is not raw_RV:
        _check_best(logits_RV.amax(dim=-1))
    tokens = _most_likely(logits_RV, [row for row, p in enumerate(params) if p.temperature <= 0])
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    noise = [uniform(params[row].seed, *keys[row]) for row in drawn]
    for row, token in zip(drawn, _draw_rows(logits_RV, drawn, params, noise, kernel), strict=True):
        tokens[row] = token
    logprobs = [
        _logprob(raw_RV[row], token, p.num_logprobs, p.logprob_token_ids) if p.num_logprobs is not None else None
        for row, (token, p) in enumerate(zip(tokens, params, strict=True))
    ]
    return tokens, logprobs


def _most_likely(logits_RV: Tensor, rows: Seq[int]) -> list[int]:
    """The likeliest token of each of `rows`; 0 stands for the others, whose turn comes."""
    if len(rows) == len(logits_RV):
        return logits_RV.argmax(dim=-1).tolist()
    tokens = [0] * len(logits_RV)
    if rows:
        for row, token in zip(rows, logits_RV[list(rows)].argmax(dim=-1).tolist(), strict=True):
            tokens[row] = token
    return tokens


def _draw_rows(
    logits_RV: Tensor, rows: Seq[int], params: Seq[SamplingParams], noise: Seq[float], kernel: SamplingKernel | None
) -> list[int]:
    """A token of each of `rows`. Args: noise: in [0, 1), one number a row."""
    if kernel is None or not rows:
        return [_draw(logits_RV[row], params[row], u) for row, u in zip(rows, noise, strict=True)]
    draws = [
        Draw(temperature=p.temperature, top_p=p.top_p, min_p=p.min_p, uniform=u, top_k=p.top_k)
        for p, u in zip((params[row] for row in rows), noise, strict=True)
    ]
    tokens = kernel.draw(logits_RV if len(rows) == len(logits_RV) else logits_RV[list(rows)], draws)
    if min(tokens) < 0:
        raise InvalidOutput("the model's logits for this request are not finite (NaN or infinite)")
    return tokens


def _check_best(highest_R: Tensor) -> None:
    """Args: highest_R: the highest logit of each row; NaN where any is."""
    if torch.isfinite(highest_R).all():
        return
    if (highest_R == -torch.inf).any():
        raise InvalidRequest(
            "no token may come next: allowed_token_ids, bad_words, min_tokens and logit_bias leave none", param=None
        )
    raise InvalidOutput("the model's logits for this request are not finite (NaN or infinite)")


def _draw(logits_V: Tensor, p: SamplingParams, u: float) -> int:
    below_V = logits_V.double() - logits_V.max()  # before dividing: no temperature, however small, overflows
    probs_V = torch.softmax(below_V / p.temperature, dim=-1)
    if p.min_p > 0:
        probs_V = torch.where(probs_V >= p.min_p * probs_V.max(), probs_V, 0.0)
    if p.top_k > 0 or p.top_p < 1:
        kept = min(p.top_k, probs_V.numel()) if p.top_k > 0 else probs_V.numel()
        ranked, ids = torch.sort(probs_V, descending=True, stable=True)
        ranked, ids = ranked[:kept], ids[:kept]
        if p.top_p < 1:
            before = torch.cumsum(ranked, dim=0) - ranked
            keep = before < p.top_p * ranked.sum()
            ranked = torch.where(keep, ranked, 0.0)
        return int(ids[_invert(ranked, u)])
    return _invert(probs_V, u)


def _invert(probs: Tensor, u: float) -> int:
    """First index whose cumulative probability exceeds u; never one of probability zero."""
    cumulative = torch.cumsum(probs, dim=0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    last = int(torch.nonzero(probs)[-1])
    return min(index, last)


def _logprob(logits_V: Tensor, token: int, num_top: int, wanted: Seq[int]) -> TokenLogprob:
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if wanted:
        ids = list(dict.fromkeys((token, *wanted)))
        top = tuple(zip(ids, logprobs_V[ids].tolist(), strict=True))
    elif num_top:
        values, ids = torch.topk(logprobs_V, min(num_top, logprobs_V.numel()))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs_V[token]), top)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
