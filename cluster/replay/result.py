"""Figures of one replay, and of a table of them: rates, bytes, times, distance to the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from cluster.replay.link import CHUNKS_PER_EXPERT
from cluster.replay.outcome import ReplayOutcome

BOUND_CACHE = "belady"
BOUND_PREFETCH = "belady+oracle"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayCell:
    """One policy on one machine. Rates are shares of the distinct experts that decode steps use, layer by layer.

    hit_rate: resident or on their way at the gate. timely_hit_rate: resident. Loads and bytes: of decode steps, per
    decoded token, prefetch included. num_loads: complete ones, of all steps. prefetch_wasted: share of the complete
    fetches ahead that were evicted unused.
    gap_to_belady: of timely hit rate; slowdown_to_oracle: of mean TPOT, over belady+oracle; None where not run.
    """

    policy: str
    cache: float
    link_gb_per_s: float
    concurrency: int
    hit_rate: float
    timely_hit_rate: float
    prefill_hit_rate: float
    loads_per_token: float
    bytes_per_token: float
    num_loads: int
    prefetch_late: int
    prefetch_wasted: float
    stall_ms_per_token: float
    tpot_ms_mean: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    ttft_ms_p50: float
    tokens_per_s: float
    gap_to_belady: float | None = None
    slowdown_to_oracle: float | None = None

    def as_row(self) -> dict[str, object]:
        """For JSON and tables."""
        return asdict(self)


def summarise(
    outcome: ReplayOutcome, *, policy: str, cache: float, link_gb_per_s: float, concurrency: int, expert_bytes: int
) -> ReplayCell:
    """The figures of one replay."""
    decode, prefill = outcome.decode, outcome.prefill
    num_decoded = max(outcome.num_tokens, 1)
    loads = outcome.decode_chunks / CHUNKS_PER_EXPERT / num_decoded
    fetched = outcome.prefetch_used + outcome.prefetch_wasted
    times_ms = 1e3 * np.array(outcome.token_s or [0.0])
    return ReplayCell(
        policy=policy,
        cache=cache,
        link_gb_per_s=link_gb_per_s,
        concurrency=concurrency,
        hit_rate=(decode.timely + decode.late) / max(decode.uses, 1),
        timely_hit_rate=decode.timely / max(decode.uses, 1),
        prefill_hit_rate=(prefill.timely + prefill.late) / max(prefill.uses, 1),
        loads_per_token=loads,
        bytes_per_token=loads * expert_bytes,
        num_loads=(outcome.demand_chunks + outcome.prefetch_chunks - outcome.dropped_chunks) // CHUNKS_PER_EXPERT,
        prefetch_late=decode.late + prefill.late,
        prefetch_wasted=outcome.prefetch_wasted / max(fetched, 1),
        stall_ms_per_token=1e3 * decode.stall_s / num_decoded,
        tpot_ms_mean=float(times_ms.mean()),
        tpot_ms_p50=float(np.percentile(times_ms, 50)),
        tpot_ms_p99=float(np.percentile(times_ms, 99)),
        ttft_ms_p50=1e3 * float(np.median(outcome.ttft_s or [0.0])),
        tokens_per_s=outcome.num_tokens / outcome.total_s if outcome.total_s else 0.0,
    )


def with_bounds(cells: Sequence[ReplayCell]) -> list[ReplayCell]:
    """The same cells, beside Belady and oracle prefetch of the same machine where these were run."""
    by_key = {_key(cell, cell.policy): cell for cell in cells}
    result: list[ReplayCell] = []
    for cell in cells:
        belady = by_key.get(_key(cell, BOUND_CACHE))
        oracle = by_key.get(_key(cell, BOUND_PREFETCH))
        gap = None if belady is None else belady.timely_hit_rate - cell.timely_hit_rate
        slowdown = None if oracle is None else cell.tpot_ms_mean / max(oracle.tpot_ms_mean, 1e-12)
        result.append(replace(cell, gap_to_belady=gap, slowdown_to_oracle=slowdown))
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeBound:
    """A machine on which no policy waits for experts. largest_stall: of all policies, as a share of the mean TPOT."""

    cache: float
    link_gb_per_s: float
    concurrency: int
    largest_stall: float

    def __str__(self) -> str:
        return (
            f"compute-bound at cache {100 * self.cache:g}%, link {self.link_gb_per_s:g} GB/s, {self.concurrency} "
            f"sequence(s): no policy waits for experts for more than {100 * self.largest_stall:.1f}% of a token's "
            f"time, so policies cannot differ there by more; try a smaller --cache or a slower --link"
        )


def compute_bound(cells: Sequence[ReplayCell], *, most: float = 0.02) -> list[ComputeBound]:
    """Machines on which policies cannot differ, because all of them compute nearly all the time.

    Args: most: largest share of the mean TPOT that a policy may wait there.
    """
    machines: dict[tuple[float, float, int], list[ReplayCell]] = {}
    for cell in cells:
        machines.setdefault((cell.cache, cell.link_gb_per_s, cell.concurrency), []).append(cell)
    found: list[ComputeBound] = []
    for (cache, link, concurrency), of_machine in machines.items():
        stall = max(cell.stall_ms_per_token * cell.concurrency / max(cell.tpot_ms_mean, 1e-12) for cell in of_machine)
        if stall <= most:
            found.append(ComputeBound(cache=cache, link_gb_per_s=link, concurrency=concurrency, largest_stall=stall))
    return found


def _key(cell: ReplayCell, policy: str) -> tuple[str, float, float, int]:
    return policy, cell.cache, cell.link_gb_per_s, cell.concurrency
