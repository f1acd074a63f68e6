"""Gate traces made up for tests: of given choices, with planted clusters, or without any structure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.trace import GateTrace, TracedModel, TracedRequest

DIM = 8


def trace_of(
    requests: Sequence[Sequence[Sequence[Sequence[int]]]], *, num_experts: int, num_prefill: int = 0
) -> GateTrace:
    """Args: requests: for each request, for each row, for each layer: the experts chosen."""
    rows = [np.array(request, dtype=np.uint16) for request in requests]
    chosen = np.concatenate(rows)
    probs = np.zeros((*chosen.shape[:2], num_experts), dtype=np.float16)
    np.put_along_axis(probs, chosen.astype(np.int64), 1 / chosen.shape[2], axis=2)
    return _trace(rows, chosen, probs, np.zeros(len(chosen), dtype=np.int32), np.ones((1, DIM)), num_prefill)


def clustered_trace(
    *,
    num_requests: int,
    num_rows: int,
    layers: int = 6,
    experts: int = 16,
    top_k: int = 2,
    clusters: int = 4,
    seed: int,
) -> GateTrace:
    """Each row belongs to one of `clusters` maps, planted by seed 0; its embedding and its gates tell which.

    clusters 0: every gate of every row is independent of everything.
    """
    planted = np.random.default_rng(0).dirichlet(np.full(experts, 0.05), size=(max(clusters, 1), layers))
    rng = np.random.default_rng(seed)
    total = num_requests * num_rows
    if clusters:
        cluster = rng.integers(clusters, size=total)
        probs = 0.9 * planted[cluster] + 0.1 * rng.dirichlet(np.ones(experts), size=(total, layers))
    else:
        cluster = rng.integers(64, size=total)
        probs = rng.dirichlet(np.full(experts, 0.2), size=(total, layers))
    chosen = np.argsort(-probs, axis=2, kind="stable")[:, :, :top_k].astype(np.uint16)
    table = np.random.default_rng(1).standard_normal((64, DIM))
    rows = [chosen[i * num_rows : (i + 1) * num_rows] for i in range(num_requests)]
    return _trace(rows, chosen, probs.astype(np.float16), cluster.astype(np.int32), table, 0)


def _trace(
    rows: list[np.ndarray], chosen: np.ndarray, probs: np.ndarray, tokens: np.ndarray, table: np.ndarray, prefill: int
) -> GateTrace:
    lengths = [len(request) for request in rows]
    position = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    vocab = np.unique(tokens)
    return GateTrace(
        model=TracedModel(
            name="made-up",
            fingerprint="f" * 16,
            layers=tuple(range(chosen.shape[1])),
            num_experts=probs.shape[2],
            top_k=chosen.shape[2],
            expert_bytes=3000,
        ),
        requests=tuple(
            TracedRequest(request_id=str(i), domain="made-up", source="", prompt_ids=(1,) * max(prefill, 1))
            for i in range(len(rows))
        ),
        row_starts=np.cumsum([0, *lengths]),
        tokens=tokens,
        positions=position,
        steps=np.maximum(position - max(prefill - 1, 0), 0).astype(np.int32),
        is_decode=position >= prefill,
        probs=probs,
        chosen=chosen,
        ahead=probs[:, 1:],
        vocab=vocab,
        embeddings=table[vocab].astype(np.float16),
    )
