"""What semantic routing would save, by counts alone: workers that keep what their own kinds of prompt use most. Pure.

A bound for thought, not a simulation (benchmark `routing` is one): caches are static, as those of a busy worker with
many sequences nearly are, so what a cache gains from the recent past counts for neither side.

Shapes: G kinds of prompt, W workers, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8


def predicted_misses(kinds_GLE: np.ndarray, scored_GLE: np.ndarray, num_workers: int, cache: float) -> float:
    """Misses with kinds dealt to workers, over misses with every worker taking all; 1 if there is nothing to gain.

    Args:
        kinds_GLE: activations to choose kinds' workers and caches by; scored_GLE: to count hits in.
        cache: share of all experts that each worker keeps.
    """
    num_kept = int(cache * kinds_GLE[0].size)
    whole = kinds_GLE.sum(axis=0)
    everyone = _missed(whole, scored_GLE.sum(axis=0), num_kept)
    if everyone <= 0:
        return 1.0
    worker_of = deal_kinds(kinds_GLE, num_workers)
    specialised = sum(
        _missed(kinds_GLE[worker_of == w].sum(axis=0), scored_GLE[worker_of == w].sum(axis=0), num_kept)
        for w in range(num_workers)
    )
    return specialised / everyone


def deal_kinds(kinds_GLE: np.ndarray, num_workers: int) -> np.ndarray:
    """The worker of every kind, (G,): alike in what they use together, about as much work for each.

    Balanced k-means on what each kind uses: in every round the kinds, the largest first, go to the nearest worker that
    is not full yet. No worker gets more than a fair share and half of the largest kind on top.
    """
    work_G = kinds_GLE.sum(axis=(1, 2))
    uses = kinds_GLE.reshape(len(kinds_GLE), -1) / np.maximum(work_G, 1e-12)[:, None]
    room = work_G.sum() / num_workers + work_G.max() / 2
    order = np.argsort(-work_G, kind="stable")
    centres = _spread_out(uses, num_workers, int(order[0]))
    worker_of = np.zeros(len(uses), dtype=np.int64)
    for _ in range(_ROUNDS):
        left = np.full(len(centres), room)
        before = worker_of.copy()
        for kind in order.tolist():
            distance = ((centres - uses[kind]) ** 2).sum(axis=1)
            fits = left >= work_G[kind]
            worker = int(np.where(fits, distance, np.inf).argmin()) if fits.any() else int(left.argmax())
            worker_of[kind] = worker
            left[worker] -= work_G[kind]
        for worker in range(len(centres)):
            if (worker_of == worker).any():
                centres[worker] = np.average(
                    uses[worker_of == worker], axis=0, weights=work_G[worker_of == worker] + 1e-12
                )
        if (before == worker_of).all():
            break
    return worker_of


def _spread_out(points: np.ndarray, count: int, first: int) -> np.ndarray:
    """Points to begin with, each as far from the others as can be."""
    chosen = [first]
    while len(chosen) < min(count, len(points)):
        nearest = np.min([((points - points[at]) ** 2).sum(axis=1) for at in chosen], axis=0)
        chosen.append(int(nearest.argmax()))
    return points[chosen].copy()


def _missed(by_LE: np.ndarray, scored_LE: np.ndarray, num_kept: int) -> float:
    """Activations outside the `num_kept` experts that `by_LE` uses most, one pool over all layers."""
    kept = np.argsort(-by_LE, axis=None, kind="stable")[:num_kept]
    return float(scored_LE.sum() - scored_LE.reshape(-1)[kept].sum())
