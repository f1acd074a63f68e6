"""Finds numbers that are not finite before anybody learns from them, and says where they began.

One look at the weights that each gate gave: what is not finite in a row reaches them, and they are few. Logits have a
look of their own. Where something is found, and only then, the layer before is computed again, row by row and expert by
expert, to name the weights at fault.

Knows rows of one step; knows nothing of requests. Shapes: T packed rows, R rows of logits, N vocabulary, D model dim, K
experts per token.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from actors.gates.work import ExpertWork
from cluster.errors import InvalidOutput
from cluster.logs import log_event

_LOG = logging.getLogger(__name__)

Compute = Callable[[ExpertWork], Tensor]
"""Routed output [T, D] of one layer's work."""


def is_sound(work: ExpertWork, num_rows: int) -> bool:
    """Whether the first `num_rows` rows of a layer are finite, as its gate saw them: a sum of T * K numbers."""
    return math.isfinite(work.topk_weights_TK[:num_rows].sum(dtype=torch.float32).item())


def unsound_rows(work: ExpertWork, num_rows: int) -> Tensor:
    """[num_rows] bool: which rows are not finite; at least one where `is_sound` says no."""
    bad_T = ~torch.isfinite(work.topk_weights_TK[:num_rows].float()).all(dim=-1)
    return bad_T if bad_T.any() else torch.ones_like(bad_T)  # finite each, but not their sum: nothing is to be believed


def sound_logits(logits_RN: Tensor) -> Tensor:
    """[R] bool: which rows can be sampled. One pass; -inf alone is a token that may not come, and allowed."""
    return torch.isfinite(logits_RN.amax(dim=-1))


def blame(
    before: ExpertWork | None, after: int | None, rows: slice, tokens: Tensor, embeddings: Tensor, compute: Compute
) -> InvalidOutput:
    """The error for a sequence whose rows are not finite.

    Args:
        before: the last layer whose gate saw finite rows; None: none did. after: the layer whose gate saw others; None:
            the logits.
        rows: the sequence's. tokens: [T] ids of the step. embeddings: [N, D] of the model.
        compute: runs experts, and counts nothing.
    """
    try:
        with torch.inference_mode():
            if before is None:
                return _blame_embeddings(tokens[rows], embeddings, after)
            return _blame_layer(before, after, rows, compute)
    except Exception as error:  # noqa: BLE001 - the request fails in any case; its reason is worth one more try, not two
        log_event(_LOG, logging.WARNING, "where numbers are not finite was not found", error=error)
        return _error(f"after layer {before.layer if before else 0}")


def _blame_embeddings(tokens_t: Tensor, embeddings_ND: Tensor, after: int | None) -> InvalidOutput:
    bad = tokens_t[~torch.isfinite(embeddings_ND[tokens_t].float()).all(dim=-1)].unique().tolist()
    if bad:
        return _error(f"from the embedding of token {bad[0]} on")
    return _error(f"before the first gate, of layer {after}" if after is not None else "before the logits")


def _blame_layer(before: ExpertWork, after: int | None, rows: slice, compute: Compute) -> InvalidOutput:
    hidden_tD, ids_tK = before.hidden_TD[rows], before.topk_ids_TK[rows]
    out_tD = compute(ExpertWork(before.layer, hidden_tD, ids_tK, before.topk_weights_TK[rows]))
    bad = (~torch.isfinite(out_tD.float()).all(dim=-1)).nonzero()[:, 0].tolist()
    if not bad:
        up_to = "the logits" if after is None else f"the gate of layer {after}"
        return _error(f"between the experts of layer {before.layer} and {up_to}")
    row, one = hidden_tD[bad[0] : bad[0] + 1], torch.ones(1, 1)
    for expert in ids_tK[bad[0]].tolist():
        alone = compute(ExpertWork(before.layer, row, torch.tensor([[expert]]), one))
        if not torch.isfinite(alone.float()).all():
            error = _error(f"from expert {expert} of layer {before.layer} on")
            error.expert = (before.layer, expert)
            return error
    return _error(f"from the experts of layer {before.layer} on")


def _error(where: str) -> InvalidOutput:
    return InvalidOutput(
        f"the model's numbers for this request are not finite (NaN or infinite) {where}: its weights are damaged, "
        "or too large for their type; another prompt may not meet them"
    )
