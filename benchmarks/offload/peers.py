"""Part two of benchmark `offload`: our engine against peers that keep the same model on the same throttled disk.

Every side runs in a process of its own, in a memory cgroup of its own measured baseline plus equal bytes, behind the
same block-I/O throttle, after its files were dropped from the page cache. The baseline of a side is what it holds in
unlimited memory besides weights and KV cache, at its peak; page-cache pages that it reads itself count against the
limit, shared libraries were loaded before and do not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.attention.build import build_engine
from benchmarks.offload.confinement import Limits, disk_of, measured_read_rate, read_ahead_kb, why_not_permitted
from benchmarks.offload.gguf import write_gguf
from benchmarks.offload.runs import Run, execute
from benchmarks.offload.side import MAX_LEN, Task
from benchmarks.offload.steps import Figures, drive
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import median
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.config.load import load_config
from cluster.model.info import load_model_info
from cluster.policies.policy_state import save_policy_state
from cluster.stats.policy_state_loop import StatefulPolicies

FACTOR = 8
OURS = "moesaic"
ON_DEMAND = "on-demand LRU"
LLAMA = "llama.cpp"
LLAMA_RANDOM = "llama.cpp, no read-ahead"
ACCELERATE = "transformers"
ALONE = "moesaic, nothing ahead"
POLICIES = {OURS: "moesaic+moesaic", ALONE: "moesaic+none", ON_DEMAND: "lru+none"}
MIN_RATIO = {
    LLAMA: 20.0,
    ACCELERATE: 10.0,
    LLAMA_RANDOM: None,
    ALONE: None,
}  # None: printed beside the targets, without one
TARGET_CACHE = 0.25
KV_BYTES = 16 * 2**20
PROMPT_TOKENS = 32
_PACKAGES = {
    LLAMA: ("llama_cpp", "gguf"),
    ACCELERATE: ("accelerate",),
    LLAMA_RANDOM: ("llama_cpp", "gguf"),
}
_PAST_PROMPTS, _PAST_TOKENS = 36, 32  # that our policies learn from beforehand
_MARGIN = 1.02  # of the baseline: it is sampled, not followed


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run. prompts: of a round; num_tokens: of each; a peer stops after peer_tokens in all or limit_s of a run;
    mb_per_s: of the throttle."""

    caches: Sequence[float]
    concurrencies: Sequence[int]
    rounds: int
    prompts: int
    num_tokens: int
    peer_tokens: int
    limit_s: float
    mb_per_s: float


FULL = Plan(
    caches=(0.125, 0.25, 0.5),
    concurrencies=(1, 8),
    rounds=3,
    prompts=8,
    num_tokens=64,
    peer_tokens=16,
    limit_s=180,
    mb_per_s=100,
)
QUICK = Plan(
    caches=(0.25,), concurrencies=(1,), rounds=2, prompts=3, num_tokens=16, peer_tokens=8, limit_s=60, mb_per_s=100
)


@dataclass(slots=True)
class Cell:
    """One side at one cache size and concurrency, all rounds. equal: share of its first tokens that are ours too."""

    figures: Figures = field(default_factory=Figures)
    rates: list[float] = field(default_factory=list)
    equal: list[float] = field(default_factory=list)
    load_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, run: Run, ours: Run, num_compared: int) -> None:
        """One round."""
        before = self.figures
        self.figures = Figures()
        self.figures.add(run.steps)
        self.rates.append(self.figures.decode_rate)
        self.figures.join(before)
        tokens = run.first_tokens(num_compared)
        same = [a == b for a, b in zip(tokens, ours.first_tokens(num_compared), strict=False)]
        self.equal.append(sum(same) / max(len(tokens), 1))
        self.load_s.append(run.load_s)
        if run.failure is not None:
            self.failures.append(run.failure)


class Peers:
    """Prepares files, measures baselines, runs cells, reports."""

    def __init__(self, report: Report, plan: Plan) -> None:
        self._report, self._plan = report, plan
        self._model = wide_model(FACTOR)
        self._gguf = self._model.with_suffix(".gguf")
        self._learned = self._model.with_name(f"{self._model.name}-learned.npz")
        self._offload_folder = self._model.with_name(f"{self._model.name}-offload")
        self._dense_bytes, self._routed_bytes = _weight_bytes(self._model)
        self._refusal = why_not_permitted(self._model)
        self._device = disk_of(self._model)
        self._sides = [OURS, *self._peers(), ALONE, ON_DEMAND]
        self._baselines: dict[str, int] = {}

    def run(self) -> None:
        """All cells, the sides in turn within each round."""
        plan, prompts = self._plan, self._prompts()
        self._note_circumstances()
        self._learn()
        for side in self._sides:
            self._measure_baseline(_program(side), prompts[:1])
        cells: dict[tuple[str, float, int], Cell] = {}
        for number in range(plan.rounds):
            of_round = prompts[number * plan.prompts : (number + 1) * plan.prompts]
            for concurrency in plan.concurrencies:
                sides = self._sides if concurrency == 1 else list(POLICIES)
                for cache in plan.caches:
                    runs: dict[str, Run] = {}
                    for side in sides:
                        limits = self._limits(self._memory_limit(side, cache))
                        runs[side] = self._execute(self._task(side, cache, concurrency, of_round), limits)
                        cell = cells.setdefault((side, cache, concurrency), Cell())
                        cell.add(runs[side], runs[OURS], plan.peer_tokens)
                        progress(
                            f"round {number + 1} of {plan.rounds}, {cache:.1%}, {concurrency} at a time, {side}: "
                            f"{cell.rates[-1]:.3g} tok/s {runs[side].failure or ''}"
                        )
        self._report_cells(cells)

    def _peers(self) -> list[str]:
        found: list[str] = []
        for side, packages in _PACKAGES.items():
            lacking = [name for name in packages if importlib.util.find_spec(name) is None]
            if lacking:
                self._report.notes.append(f"{side} skipped: {', '.join(lacking)} not installed")
            else:
                found.append(side)
        if LLAMA in found:
            write_gguf(self._model, self._gguf)
        if ACCELERATE in found and not (self._offload_folder / "index.json").is_file():
            _write_offload_folder(self._model, self._offload_folder)
        return found

    def _prompts(self) -> list[list[int]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._model)
        texts = prompts_of_domains(self._plan.rounds * self._plan.prompts + _PAST_PROMPTS)
        return [tokenizer(text).input_ids[:PROMPT_TOKENS] for text in texts]

    def _learn(self) -> None:
        """Serve other prompts, unlimited, and keep what the policies learned, as `experts.policy_state` does."""
        config = load_config(
            None,
            {
                "model": {"path": str(self._model), "dtype": "bfloat16", "max_model_len": MAX_LEN},
                "experts": {"cache": f"{100 * TARGET_CACHE}%"},
            },
        )
        info = load_model_info(str(self._model), max_model_len=MAX_LEN)
        parts = build_engine(config, info, threads=1)
        assert parts.policy_runner is not None
        past = self._prompts()[self._plan.rounds * self._plan.prompts :]
        for _ in drive(parts, past, num_tokens=_PAST_TOKENS, concurrency=1, read_bytes=lambda: 0):
            pass
        learned = StatefulPolicies(parts.policy_runner.policies.learned, parts.policy_runner.ask)
        save_policy_state(self._learned, info.fingerprint, learned.snapshot())
        parts.dispatcher.close()
        self._report.notes.append(f"{OURS} starts from what it learned from {len(past)} other prompts")

    def _limits(self, memory_bytes: int | None) -> Limits:
        rate = None if memory_bytes is None else int(self._plan.mb_per_s * 1e6)
        return Limits(memory_bytes, rate, self._device)

    def _memory_limit(self, side: str, cache: float) -> int:
        own = int(self._baselines[_program(side)] * _MARGIN)
        return own + self._dense_bytes + KV_BYTES + int(cache * self._routed_bytes)

    def _note_circumstances(self) -> None:
        if self._refusal is not None:
            self._report.notes.append(f"VOID for the ratios: no cgroups here ({self._refusal}); nobody was limited")
            return
        num_bytes = min(int(2e6 * self._plan.mb_per_s), self._routed_bytes)
        rate = measured_read_rate(self._model / "model.safetensors", self._limits(2**30), num_bytes)
        self._report.notes.append(
            f"disk {self._device} throttled to {self._plan.mb_per_s:g} MB/s (blkio, cgroup v1), direct reads under it "
            f"gave {rate / 1e6:.1f}; each side in a memory cgroup of its baseline + {KV_BYTES / 2**20:.0f} MiB for KV "
            f"+ dense weights ({self._dense_bytes / 1e6:.0f} MB) + the share of {self._routed_bytes / 1e6:.0f} MB of "
            f"experts; one compute thread each; files dropped from the page cache before each run (cold); the disk's "
            f"read-ahead is {read_ahead_kb(self._device)} KB, which mapped files follow and direct reads do not"
        )

    def _measure_baseline(self, side: str, prompts: Sequence[Sequence[int]]) -> None:
        """Twice, because the first run is the one that loads the libraries; once for a program."""
        if side in self._baselines:
            return
        task = self._task(side, min(self._plan.caches), max(self._plan.concurrencies), prompts)
        for _ in range(2):
            run = self._execute(task, self._limits(None))
            if run.failure is not None:
                raise RuntimeError(f"{side} in unlimited memory: {run.failure}")
            self._baselines[side] = max(0, run.peak_bytes - run.held_bytes)
        progress(f"{side}: baseline {self._baselines[side] / 2**20:.0f} MiB")

    def _execute(self, task: Task, limits: Limits) -> Run:
        files = [Path(task.model), *([self._offload_folder] if self._offload_folder.is_dir() else [])]
        return execute(task, limits, files, permitted=self._refusal is None)

    def _task(self, side: str, cache: float, concurrency: int, prompts: Sequence[Sequence[int]]) -> Task:
        is_ours = side in POLICIES
        return Task(
            side=OURS if is_ours else side,
            model=str(self._gguf if side.startswith(LLAMA) else self._model),
            offload_folder=str(self._offload_folder),
            cache=cache,
            policy=POLICIES.get(side, ""),
            prompts=prompts,
            num_tokens=self._plan.num_tokens,
            concurrency=concurrency,
            max_tokens=2**31 if is_ours else self._plan.peer_tokens,
            limit_s=3600.0 if is_ours else self._plan.limit_s,
            kv_bytes=KV_BYTES,
            learned=str(self._learned) if is_ours else "",
        )

    def _report_cells(self, cells: dict[tuple[str, float, int], Cell]) -> None:
        for (side, cache, concurrency), cell in cells.items():
            columns = cell.figures.columns() | {"tok/s": median(cell.rates)}
            self._report.rows.append(
                {"side": side, "cache": f"{cache:.1%}", "at a time": concurrency}
                | {"limit MiB": round(self._memory_limit(side, cache) / 2**20)}
                | columns
                | {"tokens as ours": f"{sum(cell.equal) / len(cell.equal):.0%}", "load s": median(cell.load_s)}
            )
            for failure in sorted(set(cell.failures)):
                self._report.notes.append(f"{side} at {cache:.1%}, {concurrency} at a time: {failure}")
        for side, bound in MIN_RATIO.items():
            if (side, TARGET_CACHE, 1) in cells and self._refusal is None:
                self._add_ratio(cells[OURS, TARGET_CACHE, 1], cells[side, TARGET_CACHE, 1], side, bound)

    def _add_ratio(self, ours: Cell, theirs: Cell, side: str, bound: float | None) -> None:
        """A peer that made no token is taken to have been about to: the ratio is then a lower bound."""
        least = 1.0 / self._plan.limit_s
        if not all(theirs.rates):
            self._report.notes.append(f"{side} made no token in some rounds: its rate there is taken as {least:.2g}")
        ratio = median([a / max(b, least) for a, b in zip(ours.rates, theirs.rates, strict=True)])
        name = f"{TARGET_CACHE:.0%}, 1 at a time: tok/s over {side}"
        if bound is None:
            self._report.notes.append(f"{name}: {ratio:.3g}")
        else:
            self._report.at_least(name, ratio, bound)


def _program(side: str) -> str:
    """Sides that are one program with other settings have one baseline."""
    return OURS if side in POLICIES else side.split(",")[0]


def _weight_bytes(model: Path) -> tuple[int, int]:
    """Bytes of dense weights and of routed experts in the checkpoint."""
    from cluster.model.safetensors_index import read_index

    routed = dense = 0
    for name, tensor in read_index(model).items():
        if ".experts." in name:
            routed += tensor.num_bytes
        else:
            dense += tensor.num_bytes
    return dense, routed


def _write_offload_folder(model: Path, folder: Path) -> None:
    """What accelerate's disk offload reads: one memory-mapped file a tensor, as the modules hold them."""
    import torch
    from accelerate.utils import offload_state_dict
    from transformers import AutoModelForCausalLM

    progress(f"writing {folder}")
    offload_state_dict(str(folder), AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict())
