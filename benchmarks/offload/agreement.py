"""Whether the live engine agrees with replay: the same prompts, policies, learned past and measured compute times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.offload.steps import Figures
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import median
from benchmarks.shared.report import Report
from cluster.policies.trace import GateTrace
from cluster.replay.machine import Processor
from cluster.replay.sweep import Past, Sweep, learn_past, replay_cells

MAX_HIT_POINTS = 0.02
MAX_TPOT = 1.2
_MAX_WAKE_S, _HALVINGS = 0.02, 12
Key = tuple[str, float, float, int]  # policy, cache, GB/s, sequences at a time


@dataclass(frozen=True, slots=True)
class ComputeTimes:
    """Of a layer besides its experts, and of one expert, in seconds.

    sequence_s: of a layer, for every sequence but the first. spread: of the layers of one sequence's tokens, the
    standard deviation of the logarithm. contention: how much longer computing takes while the link is busy, as a share.
    search_s: by policy, how much longer a layer takes while the policy's thread searches beside the computation.
    """

    base_s: float
    expert_s: float
    sequence_s: float
    spread: float = 0.0
    contention: float = 0.0
    search_s: dict[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def of(cls, alone: Figures, alike: Figures, many: Figures, *, num_layers: int) -> ComputeTimes:
        """From resident runs of one sequence, of several alike, which use the same experts, and of several others."""
        (few, alone_s, _), (also_few, alike_s, count), (most, many_s, _) = (
            _experts_and_time(figures) for figures in (alone, alike, many)
        )
        expert_s = max((many_s - alike_s) / max(most - also_few, 1.0), 1e-6)
        base_s, several_s = (
            max(took_s - used * expert_s, 1e-6) / num_layers for used, took_s in ((few, alone_s), (also_few, alike_s))
        )
        return cls(base_s, expert_s, max(several_s - base_s, 0.0) / max(count - 1, 1))

    def text(self) -> str:
        """For a note."""
        text = f"measured {1e3 * self.base_s:.2f} ms a layer, {1e3 * self.sequence_s:.2f} for every sequence more, "
        text += f"{1e3 * self.expert_s:.2f} an expert, resident; spread from layer to layer {self.spread:.0%}; "
        text += f"{self.contention:.0%} longer beside a busy link"
        if self.search_s:
            least_s, most_s = min(self.search_s.values()), max(self.search_s.values())
            text += f"; {1e3 * least_s:.2f} to {1e3 * most_s:.2f} ms a layer more beside the policies' search"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimes:
    """Of one run of a live cell.

    pace: what computing takes on the machine around it, of what it took when it was measured. load_cpu_s:
    processor time of a load, as its price of prefetch had it. lag_s: how late chunks of prefetches began on average.
    forecast_s: from a gate to its forecast, by the clock, and forecast_spread, the standard deviation of the logarithm.
    """

    pace: float = 1.0
    load_cpu_s: float = 0.0
    lag_s: float = 0.0
    forecast_s: float = 0.0
    forecast_spread: float = 0.0


class Agreement:
    """Collects live cells, replays them, compares."""

    def __init__(self, report: Report, past: GateTrace, held_out: Mapping[int, GateTrace], times: ComputeTimes) -> None:
        """Args: held_out: what is measured, by the number of sequences at a time."""
        self._report, self._past, self._held_out, self._times = report, past, held_out, times
        self._live: dict[Key, dict[str, Any]] = {}
        self._runs: dict[Key, Sequence[RunTimes]] = {}

    def expect(self, row: dict[str, Any], key: Key, runs: Sequence[RunTimes]) -> None:
        """A live cell whose replay is wanted, run by run; the replay's figures are added to its row."""
        self._live[key] = row
        self._runs[key] = runs

    def finish(self) -> None:
        """Replay them all, add columns and targets."""
        policies, caches, links, concurrencies = (_distinct(values) for values in zip(*self._live, strict=True))
        sweep = Sweep(
            policies=policies,
            caches=caches,
            links=links,
            concurrencies=concurrencies,
            has_ring=True,
        )
        progress(f"replaying {len(self._live)} cells")
        past = learn_past(self._past, sweep)
        wake_s = self._calibrate(sweep)
        for key, row in self._live.items():
            row["replay hit"], tpot_ms = self._replay(key, sweep, past, wake_s)
            row["live/replay TPOT"] = row["p50 ms"] / tpot_ms
        self._note_times()
        self._add_targets()

    def _calibrate(self, sweep: Sweep) -> float:
        """What a load costs the computation, from the first live cell, that of on-demand LRU: what makes it agree."""
        self._first = next(iter(self._live))
        policy, _, link, concurrency = self._first
        wanted_ms = self._live[self._first]["p50 ms"]

        # Part of it hides behind the loads that follow, so the gap is no multiple of it.
        low_s, high_s = 0.0, _MAX_WAKE_S
        for _ in range(_HALVINGS):
            middle_s = (low_s + high_s) / 2
            _, replayed_ms = self._replay(self._first, sweep, None, middle_s)
            low_s, high_s = (middle_s, high_s) if replayed_ms < wanted_ms else (low_s, middle_s)
        self._report.notes.append(
            f"replay: {1e3 * low_s:.2f} ms more for every expert waited for (waking up, copies beside the compute), "
            f"measured in the cell {policy}, {link:g} GB/s, {concurrency} at a time, which is not among the targets"
        )
        return low_s

    def _replay(self, key: Key, sweep: Sweep, past: Past | None, wake_s: float) -> tuple[float, float]:
        """Hit rate and median TPOT in ms of a cell's runs, on average."""
        runs = [self._of_run(sweep, key, own, wake_s) for own in self._runs[key]]
        cells = [cell for run in runs for cell in replay_cells(self._held_out[key[3]], past, run)]
        return float(np.mean([cell.hit_rate for cell in cells])), float(np.mean([cell.tpot_ms_p50 for cell in cells]))

    def _of_run(self, sweep: Sweep, key: Key, own: RunTimes, wake_s: float) -> Sweep:
        """One cell of it, computing as fast as the machine did before and after the run."""
        (policy, cache, link, at_once), times = key, self._times
        search_s = times.search_s.get(policy, 0.0)
        base_s = times.base_s if own.forecast_s else times.base_s + search_s  # when it searched is known with forecasts
        return replace(
            sweep,
            policies=(policy,),
            caches=(cache,),
            links=(link,),
            concurrencies=(at_once,),
            processor=Processor(
                base_s=own.pace * base_s,
                sequence_s=own.pace * times.sequence_s,
                expert_s=own.pace * times.expert_s,
                wake_s=own.pace * wake_s,
                spread=times.spread,
                contention=times.contention,
                lag_s=own.lag_s,
                predict_s=own.forecast_s,
                predict_spread=own.forecast_spread,
                search_s=own.pace * search_s,
            ),
            load_cpu_s=own.load_cpu_s,
        )

    def _note_times(self) -> None:
        """What was measured in the runs."""
        runs = list(itertools.chain.from_iterable(self._runs.values()))
        paces = [run.pace for run in runs]
        text = f"replay: computing takes {min(paces):.2f} to {max(paces):.2f} of the measured times, by run"
        ahead = [run for run in runs if run.forecast_s]
        if ahead:
            forecasts_ms, lags_ms = [1e3 * run.forecast_s for run in ahead], [1e3 * run.lag_s for run in ahead]
            text += f"; a forecast {min(forecasts_ms):.2f} to {max(forecasts_ms):.2f} ms after its gate, a chunk ahead "
            text += f"{min(lags_ms):.2f} to {max(lags_ms):.2f} ms late"
        self._report.notes.append(text)

    def _add_targets(self) -> None:
        """The targets are of one sequence at a time and of several alike."""
        hits = {key: abs(row["hit"] - row["replay hit"]) for key, row in self._live.items()}
        ratios = {key: row["live/replay TPOT"] for key, row in self._live.items() if key != self._first}
        times = {key: math.exp(abs(math.log(ratio))) for key, ratio in ratios.items()}
        for name, values, bound in (
            ("live against replay: hit rate, worst cell, difference", hits, MAX_HIT_POINTS),
            ("live against replay: TPOT, worst cell, ratio", times, MAX_TPOT),
        ):
            worst = max(values, key=lambda key: values[key])
            policy, cache, link, concurrency = worst
            self._report.at_most(name, values[worst], bound)
            self._report.notes.append(
                f"{name}: {policy}, {cache:.1%}, {link:g} GB/s, {concurrency} at a time; the median over all "
                f"{len(values)} cells is {float(np.median(list(values.values()))):.3g}"
            )


def _experts_and_time(figures: Figures) -> tuple[float, float, int]:
    """Distinct experts of all layers, seconds and sequences of the usual decode step: those with most sequences."""
    largest = max(len(step.tokens) for step in figures.decode)
    steps = [step for step in figures.decode if len(step.tokens) == largest and step.memory is not None]
    used = [step.memory.hits + step.memory.misses for step in steps if step.memory]
    return float(np.mean(used)), median([step.ended_s - step.began_s for step in steps]), largest


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))
