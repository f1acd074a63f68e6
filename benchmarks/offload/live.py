"""Part one of benchmark `offload`: our engine with every policy over the declared (emulated) link from RAM to DEVICE.

Each cell is an engine of its own: RAM holds every expert before it starts, DEVICE is empty, the KV cache too; policies
that learn have seen other prompts (the past), never those that are measured. One thread computes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from actors.engine.loaded_engine import LoadedEngine
from actors.engine.trace_recorder import record_trace
from actors.gates.reader import gate_modules
from benchmarks.offload.agreement import Agreement, ComputeTimes, Key, RunTimes
from benchmarks.offload.engine import MAX_LEN, engine, fill_ram, keep_loading, learn, make_resident, timed_forecasts
from benchmarks.offload.steps import Figures, MemoryUse, Step, drive
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import median, read_bytes_of_process
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.model.info import load_model_info
from cluster.policies.trace import GateTrace, TracedRequest
from cluster.replay.schedule import ReplayStep, build_steps, mixed_order
from cluster.types import SamplingParams, Tier

FACTOR = 32
ALONE = ("lru+none", "lfu+none", "mrs+none", "eam+none", "fmoe+none", "moesaic+none")
AHEAD = ("lru+next-gate", "mrs+next-gate", "eam+eam", "fmoe+fmoe", "moesaic+moesaic")
OFF, ON = "lru+none", "moesaic+moesaic"
PROMPT_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run. prompts: measured in each run of a cell, past: of others to learn from; num_tokens of each.

    rounds: of all cells, one after the other. pairs: of runs that alternate, with everything resident.
    """

    policies: Sequence[str]
    caches: Sequence[float]
    links: Sequence[float]
    concurrencies: Sequence[int]
    prompts: int
    past: int
    num_tokens: int
    rounds: int
    pairs: int


FULL = Plan(
    policies=(*ALONE, *AHEAD),
    caches=(0.25, 0.125, 0.5),
    links=(2.0,),
    concurrencies=(1, 8),
    prompts=10,
    past=36,
    num_tokens=64,
    rounds=2,
    pairs=9,
)
QUICK = Plan(
    policies=(OFF, "mrs+none", "mrs+next-gate", "moesaic+none", ON),
    caches=(0.25,),
    links=(1.0,),
    concurrencies=(1, 8),
    prompts=8,
    past=18,
    num_tokens=16,
    rounds=1,
    pairs=3,
)


@dataclass(slots=True)
class Cell:
    """The runs of one cell, together. search_s: in which policies searched, for num_gates."""

    figures: Figures = field(default_factory=Figures)
    search_s: float = 0.0
    num_gates: int = 0
    times: list[RunTimes] = field(default_factory=list[RunTimes])


class Live:
    """Builds engines, runs cells, compares with replay."""

    def __init__(self, report: Report, plan: Plan) -> None:
        self._report, self._plan = report, plan
        self._path = wide_model(FACTOR)
        self._info = load_model_info(str(self._path), max_model_len=MAX_LEN)
        ids = self._prompt_ids()
        self._past_ids = ids[plan.prompts :]
        self._order = mixed_order(plan.prompts)  # in which a replay takes them
        self._ordered = [ids[i] for i in self._order]

    def run(self) -> None:
        """Everything resident first, then every cell, then the same in replay."""
        plan = self._plan
        with engine(self._info, OFF, cache=1.0) as resident:
            make_resident(resident)
            progress("recording traces")
            past = self._record(self._past_ids, concurrency=8)
            held_out = {concurrency: self._record_measured(concurrency) for concurrency in plan.concurrencies}
            with engine(self._info, ON, cache=1.0) as predicting:
                make_resident(predicting)
                self._compare_resident(predicting)
            times, usual_s = self._compute_times(resident), self._layer_s(resident)
            steps = build_steps(past, concurrency=1, order=mixed_order(len(past.requests)))
            for policy in plan.policies:
                if policy != OFF:
                    times.search_s[policy] = usual_s * self._search_share(policy, resident, steps)
            times = replace(times, contention=self._contention(resident))
            agreement = Agreement(self._report, past, held_out, times)
            cells = self._run_cells(resident, usual_s, steps)
        for key, cell in cells.items():
            self._report.rows.append(self._row(key, cell))
            agreement.expect(self._report.rows[-1], key, cell.times)
        agreement.finish()
        self._report.notes.append(
            f"{plan.rounds} rounds; RAM full and DEVICE empty at the start of each run; learned from {plan.past} "
            "other prompts; one compute thread; the link is emulated (declared GB/s); hit: resident or on the way, "
            f"timely: resident; {times.text()}"
        )

    def _prompt_ids(self) -> list[list[int]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._path)
        texts = prompts_of_domains(self._plan.prompts + self._plan.past)
        return [tokenizer(text).input_ids[:PROMPT_TOKENS] for text in texts]

    def _record_measured(self, concurrency: int) -> GateTrace:
        """As the cells will run them: in bfloat16 answers depend on what shares a step."""
        trace = self._record(self._ordered, concurrency)
        return trace.select([int(i) for i in np.argsort(self._order)])

    def _record(self, prompts: Sequence[Sequence[int]], concurrency: int) -> GateTrace:
        """By an engine of its own, whose KV cache knows no prompt."""
        requests = [
            TracedRequest(request_id=str(i), domain="", source="", prompt_ids=tuple(ids))
            for i, ids in enumerate(prompts)
        ]
        sampling = SamplingParams(max_tokens=self._plan.num_tokens, temperature=0.0, ignore_eos=True)
        with engine(self._info, OFF, cache=1.0) as parts:
            make_resident(parts)
            return record_trace(parts, self._info, requests, sampling, num_running=concurrency)

    def _compare_resident(self, parts: LoadedEngine) -> None:
        """Of one engine, predicting or not: two engines differ more than that by where their memory lies."""
        rates: dict[str, list[float]] = {OFF: [], ON: []}
        disk_bytes = 0
        runner = parts.engine.runner
        taps = {OFF: None, ON: runner.signals}
        for number in range(-1, self._plan.pairs):
            for name, tap in taps.items():
                runner.signals = tap
                figures = self._figures(parts, self._ordered[:4], concurrency=1)
                if number >= 0:
                    rates[name].append(figures.decode_rate)
                    disk_bytes += sum(step.memory.disk_bytes for step in figures.steps if step.memory)
        ratio = median([on / off for on, off in zip(rates[ON], rates[OFF], strict=True)])
        progress(
            f"everything resident: {median(rates[ON]):.1f} tok/s with prediction, {median(rates[OFF]):.1f} without"
        )
        self._report.at_least("everything resident: tok/s with prediction on / off", ratio, 0.97)
        self._report.at_most("cache 100%: bytes read after warm-up", disk_bytes, 0)

    def _compute_times(self, parts: LoadedEngine) -> ComputeTimes:
        alone = self._figures(parts, self._ordered, concurrency=1)
        alike = self._figures(parts, 8 * self._ordered[:1], concurrency=8)
        many = self._figures(parts, self._ordered, concurrency=8)
        times = ComputeTimes.of(alone, alike, many, num_layers=parts.store.grid.num_layers)
        return replace(times, spread=self._spread(parts))

    def _spread(self, parts: LoadedEngine) -> float:
        """Of the times from gate to gate, one sequence's tokens, everything resident."""
        spoke_s: list[float] = []
        gates = gate_modules(parts.engine.runner.model).values()
        hooks = [gate.register_forward_hook(lambda *_: spoke_s.append(time.perf_counter())) for gate in gates]
        try:
            steps = self._figures(parts, self._ordered, concurrency=1).steps
        finally:
            for hook in hooks:
                hook.remove()
        by_step = np.array(spoke_s).reshape(len(steps), len(hooks))
        decode = by_step[[not step.has_prompt_rows for step in steps]]
        return float(np.log(np.diff(decode)).std())

    def _layer_s(self, resident: LoadedEngine) -> float:
        """What a layer of one sequence's tokens takes now: neighbours make the machine slower for minutes."""
        steps = self._figures(resident, self._ordered[:3], concurrency=1).decode
        return median([step.ended_s - step.began_s for step in steps]) / resident.store.grid.num_layers

    def _search_share(self, policy: str, alone: LoadedEngine, past: Sequence[ReplayStep]) -> float:
        """How much longer a layer takes beside a policy's search, of one without, with which it alternates.

        One expert less than all fits: with all resident nothing is searched."""
        with engine(self._info, policy, cache=1 - 0.5 / alone.store.grid.size) as parts:
            make_resident(parts)
            learn(parts, past)
            more: list[float] = []
            for number in range(-1, self._plan.pairs):
                alone_s, searching_s = (self._layer_s(each) for each in (alone, parts))
                if number >= 0:
                    more.append(searching_s / alone_s - 1)
        progress(f"{policy}: a layer takes {median(more):.1%} longer beside its search")
        return max(median(more), 0.0)

    def _contention(self, alone: LoadedEngine) -> float:
        """How much longer computing takes while the link into another engine's memory is busy, as a share of that."""
        link = self._plan.links[0]
        more: list[float] = []
        with engine(self._info, OFF, cache=0.5, link=link) as parts:
            fill_ram(parts)
            moved = parts.store.counters.bytes_moved
            for number in range(-1, self._plan.pairs):
                alone_s = self._layer_s(alone)
                with keep_loading(parts.store):
                    began_s, moved_bytes = time.perf_counter(), moved[Tier.RAM]
                    beside_s = self._layer_s(alone)
                    elapsed_s, moved_bytes = time.perf_counter() - began_s, moved[Tier.RAM] - moved_bytes
                if number >= 0:
                    more.append((beside_s / alone_s - 1) * elapsed_s / (moved_bytes / (link * 1e9)))
        progress(f"computing takes {median(more):.1%} longer beside a busy link")
        return max(median(more), 0.0)

    def _figures(self, parts: LoadedEngine, prompts: Sequence[Sequence[int]], concurrency: int) -> Figures:
        figures = Figures()
        figures.add(list(self._drive(parts, prompts, concurrency)))
        return figures

    def _drive(self, parts: LoadedEngine, prompts: Sequence[Sequence[int]], concurrency: int) -> Iterator[Step]:
        num_tokens = self._plan.num_tokens
        return drive(parts, prompts, num_tokens=num_tokens, concurrency=concurrency, read_bytes=read_bytes_of_process)

    def _run_cells(self, resident: LoadedEngine, usual_s: float, past: Sequence[ReplayStep]) -> dict[Key, Cell]:
        """All of them, round by round: a noisy minute is not a cell. An interrupt leaves those run so far."""
        plan = self._plan
        cells: dict[Key, Cell] = defaultdict(Cell)
        settings = product(plan.caches, plan.policies, plan.links, plan.concurrencies)
        keys = [(policy, cache, link, concurrency) for cache, policy, link, concurrency in settings]
        before_s = self._layer_s(resident)
        try:
            for key in plan.rounds * keys:
                figures, search_s, times = self._run_cell(key, past)
                after_s = self._layer_s(resident)
                cell = cells[key]
                cell.figures.join(figures)
                cell.search_s += search_s
                cell.num_gates += len(figures.steps) * resident.store.grid.num_layers
                cell.times.append(replace(times, pace=(before_s + after_s) / 2 / usual_s))
                before_s = after_s
        except KeyboardInterrupt:
            if not cells:
                raise
            num_runs = sum(len(cell.times) for cell in cells.values())
            self._report.notes.append(f"stopped after {num_runs} of {plan.rounds * len(keys)} runs")
        return cells

    def _run_cell(self, key: Key, past: Sequence[ReplayStep]) -> tuple[Figures, float, RunTimes]:
        """One run: its figures, seconds of search, and what was measured beside."""
        policy, cache, link, concurrency = key
        with engine(self._info, policy, cache=cache, link=link) as parts:
            fill_ram(parts)
            learn(parts, past)
            busy_s = parts.policy_runner.busy_s if parts.policy_runner else 0.0
            with timed_forecasts(parts) as forecasts_s:
                figures = self._figures(parts, self._ordered, concurrency)
            busy_s = parts.policy_runner.busy_s - busy_s if parts.policy_runner else 0.0
            times = RunTimes(load_cpu_s=parts.store.load_cpu_s(), lag_s=parts.store.load_late_s())
            if forecasts_s:
                logs = np.log(forecasts_s)  # a few that met a pause of the machine count little
                forecast_s = float(np.exp(logs.mean() + logs.var() / 2))
                times = replace(times, forecast_s=forecast_s, forecast_spread=float(logs.std()))
        progress(f"{policy}, {cache:.1%}, {link:g} GB/s, {concurrency} at a time: {figures.decode_rate:.4g} tok/s")
        return figures, busy_s, times

    def _row(self, key: Key, cell: Cell) -> dict[str, Any]:
        policy, cache, link, concurrency = key
        figures = cell.figures
        row = {"policy": policy, "cache": f"{cache:.1%}", "GB/s": f"{link:g}", "at a time": concurrency}
        row |= figures.columns() | _prefetch_columns(figures.memory, figures.num_decoded)
        row |= {
            "search share": cell.search_s / figures.elapsed_s,
            "search ms/gate": 1e3 * cell.search_s / cell.num_gates,
        }
        return row


def _prefetch_columns(memory: MemoryUse, num_decoded: int) -> dict[str, float | int]:
    num_tokens = max(num_decoded, 1)
    return {
        "MB link/token": memory.ram_bytes / num_tokens / 1e6,
        "stall ms": 1e3 * memory.stall_s / num_tokens,
        "used": memory.prefetch_used,
        "late": memory.late,
        "wasted": memory.prefetch_wasted,
    }
