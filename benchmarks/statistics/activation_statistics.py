"""What recording and flushing activation statistics costs: share of step time, and throughput with and without.

The engine runs in this process with one thread, all experts resident, and a real Valkey beside it. Three kinds of
blocks of the same work: timed (clocks around every record call), on (recording by 16 clusters of prompts, and a
statistics loop that flushes every 2 s) and off (neither). On and off alternate in ABBA order, and their outputs are
checked equal. In the same way a store whose Valkey was killed is compared with one that is there. The demo model is
not widened: the shorter the steps, the larger the share.

    python -m benchmarks activation_statistics [--quick] [--json] [--factor 1]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from actors.engine.loaded_engine import LoadedEngine
from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork
from actors.kernels.native import load_native
from benchmarks.shared.command_line import progress
from benchmarks.shared.engines import resident_engine
from benchmarks.shared.measuring import median, one_thread
from benchmarks.shared.models import DEMO, wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.application import DEFAULT_APPLICATION
from cluster.protocols import StateStore
from cluster.semantics.clusters import Clusters
from cluster.semantics.expectation import make_knowledge
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, ExpertStatistics, no_statistics
from cluster.stats.embedded_valkey import start_embedded_valkey
from cluster.stats.open_store import open_store
from cluster.stats.statistics_loop import StatisticsLoop
from cluster.types import GenerationRequest, Phase, RequestId, SamplingParams

CONCURRENCY = (1, 8)
MAX_SHARE, MAX_DOWN = 0.01, 0.02
SWITCH_INTERVAL_S = 0.0005  # as in the server's workers
LARGE = (58, 256)  # MoE layers and experts of DeepSeek-V3
MAX_TOKENS = 1500
NUM_CLUSTERS = 16


class _NoRecorder(ActivationRecorder):
    def record(self, work: ExpertWork, num_rows: int, num_decode: int) -> None:
        """Nothing."""


class _TimedRecorder(ActivationRecorder):
    """The clocks' own time is in the result: an upper bound."""

    record_s = 0.0
    num_calls = 0

    def record(self, work: ExpertWork, num_rows: int, num_decode: int) -> None:
        began = time.perf_counter()
        super().record(work, num_rows, num_decode)
        self.record_s += time.perf_counter() - began
        self.num_calls += 1


@dataclass(frozen=True, slots=True)
class _Block:
    """One pass over the same work."""

    elapsed_s: float
    tokens: list[list[int]]
    flushes: int = 0
    flush_cpu_s: float = 0.0

    @property
    def speed(self) -> float:
        return sum(map(len, self.tokens)) / self.elapsed_s


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--factor", type=int, default=1, help="how much wider than the demo model the experts are")


def run(options: Namespace) -> Report:
    """Measure."""
    block_s, pairs = (5.0, 4) if options.quick else (12.0, 8)
    path = wide_model(options.factor) if options.factor > 1 else DEMO
    report = Report(f"Activation statistics, {path.name}, bfloat16, one thread, blocks of about {block_s:.0f} s")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with one_thread(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        server = start_embedded_valkey(Path(folder))
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            prompts = [tokenizer(text).input_ids[:32] for text in prompts_of_domains(max(CONCURRENCY))]
            progress("loading")
            parts = resident_engine(path)
            for concurrency in CONCURRENCY:
                store = open_store(server.url, DEFAULT_APPLICATION)
                _compare(report, parts, store, prompts[:concurrency], block_s=block_s, pairs=pairs)
            _compare_down(
                report, parts, open_store(server.url, DEFAULT_APPLICATION), prompts, block_s=block_s, pairs=pairs
            )
            _large_flush(report, open_store(server.url, DEFAULT_APPLICATION))
            parts.dispatcher.close()
        finally:
            server.stop()
    report.notes.append(
        "flush: processor time of the flushing thread over the time of the step loop, as if none of it were "
        "overlapped; record: clocks around every call included. Warm, all experts resident, prompts in the KV cache."
    )
    return report


def _compare(
    report: Report, parts: LoadedEngine, store: StateStore, prompts: list[list[int]], *, block_s: float, pairs: int
) -> None:
    layers, num_experts = _shape(parts)
    name = f"{len(prompts)} sequences"
    knowledge = _knowledge(layers, num_experts)
    parts.engine.set_knowledge(knowledge)  # tells the prompts apart; the recorders of the blocks count them
    off = _NoRecorder(layers, num_experts, None)
    warm = _run(parts, off, prompts, 64)
    num_tokens = min(MAX_TOKENS, int(block_s * warm.speed / len(prompts)) + 1)
    timed = _TimedRecorder(layers, num_experts, load_native())
    timed.set_knowledge(knowledge)
    timed_block = _run(parts, timed, prompts, num_tokens)
    ons: list[_Block] = []
    ratios: list[float] = []
    for pair in range(pairs):
        sides: dict[bool, _Block] = {}
        for is_on in ((True, False), (False, True))[pair % 2]:
            sides[is_on] = (
                _run_on(parts, store, prompts, num_tokens) if is_on else _run(parts, off, prompts, num_tokens)
            )
        assert sides[True].tokens == sides[False].tokens == timed_block.tokens, "statistics changed an output"
        ons.append(sides[True])
        ratios.append(sides[True].speed / sides[False].speed)
        progress(f"{name}, pair {pair + 1} of {pairs}: on {sides[True].speed:.1f}, off {sides[False].speed:.1f} tok/s")
    record = timed.record_s / timed_block.elapsed_s
    flush = sum(b.flush_cpu_s for b in ons) / sum(b.elapsed_s for b in ons)
    low, high = _interval(ratios)
    report.rows.append(
        {
            "work": name,
            "tok/s on": median([b.speed for b in ons]),
            "record us / layer": 1e6 * timed.record_s / timed.num_calls,
            "record share": record,
            "flush ms": 1e3 * sum(b.flush_cpu_s for b in ons) / max(1, sum(b.flushes for b in ons)),
            "flushes": sum(b.flushes for b in ons),
            "flush share": flush,
            "on / off": median(ratios),
            "95% interval": f"{low:.3f} to {high:.3f}",
        }
    )
    report.at_most(f"{name}: recording and flushing, share of step time", record + flush, MAX_SHARE)
    report.at_least(f"{name}: throughput on / off, upper end of the interval", high, 1 - MAX_SHARE)


def _compare_down(
    report: Report, parts: LoadedEngine, store: StateStore, prompts: list[list[int]], *, block_s: float, pairs: int
) -> None:
    """A store that was lost while the server ran, against one that is there."""
    with tempfile.TemporaryDirectory() as folder:
        server = start_embedded_valkey(Path(folder))
        lost = open_store(server.url, DEFAULT_APPLICATION)
        _run_on(parts, lost, prompts, 16)
        server.stop()
    num_tokens = min(MAX_TOKENS, int(block_s * 500 / len(prompts)) + 1)
    blocks: dict[bool, list[_Block]] = {True: [], False: []}
    for pair in range(pairs):
        for is_up in ((True, False), (False, True))[pair % 2]:
            block = _run_on(parts, store if is_up else lost, prompts, num_tokens, is_up=is_up)
            blocks[is_up].append(block)
        progress(
            f"Redis, pair {pair + 1} of {pairs}: up {blocks[True][-1].speed:.1f}, down {blocks[False][-1].speed:.1f}"
        )
    assert len({str(block.tokens) for side in blocks.values() for block in side}) == 1, "an output changed"
    ratios = [down.speed / up.speed for up, down in zip(blocks[True], blocks[False], strict=True)]
    low, high = _interval(ratios)
    up, down = (
        sum(block.flush_cpu_s for block in blocks[is_up]) / sum(block.elapsed_s for block in blocks[is_up])
        for is_up in (True, False)
    )
    report.rows.append(
        dict.fromkeys(report.rows[0], "-")
        | {"work": f"{len(prompts)} sequences, Redis down", "tok/s on": median([b.speed for b in blocks[False]])}
        | {"flush share": down, "on / off": f"{median(ratios):.4g} of up", "95% interval": f"{low:.3f} to {high:.3f}"}
    )
    report.at_most("Redis down: share of step time more than up", down - up, MAX_DOWN)
    report.at_least("Redis down: throughput down / up, upper end of the interval", high, 1 - MAX_DOWN)


def _large_flush(report: Report, store: StateStore) -> None:
    """A flush in which every expert of a large model changed, for 8 of 16 clusters, and how far apart such are."""
    layers, num_experts = LARGE
    recorded = _Recorded(layers, num_experts)
    loop = StatisticsLoop(store, "large", interval_s=2.0)
    loop.start(recorded)
    recorded.grow()
    while loop.num_flushes == 0:
        time.sleep(0.05)
    loop.stop()
    assert sum(sum(sum(row.values()) for row in rows.values()) for rows in store.activations("large").values()) == (
        len(Phase) * layers * num_experts
    ), "counts are missing"
    share = loop.flush_cpu_s / loop.wait_s
    report.rows.append(
        dict.fromkeys(report.rows[0], "-")
        | {"work": f"{layers} layers of {num_experts} experts", "flush ms": 1e3 * loop.flush_cpu_s, "flushes": 1}
        | {"flush share": share}
    )
    report.at_most(f"{layers} x {num_experts} experts: flushing, share of time", share, MAX_SHARE)


def _run_on(
    parts: LoadedEngine, store: StateStore, prompts: list[list[int]], num_tokens: int, *, is_up: bool = True
) -> _Block:
    """With recording and flushing; every count must be in the store afterwards, if it is up."""
    fingerprint = f"run-{time.monotonic_ns()}"
    recorder = ActivationRecorder(*_shape(parts), load_native())
    loop = StatisticsLoop(store, fingerprint)
    recorder.set_knowledge(_knowledge(*_shape(parts)))
    loop.start(recorder)
    block = _run(parts, recorder, prompts, num_tokens)
    flushes, cpu_s = loop.num_flushes, loop.flush_cpu_s
    loop.stop()
    if not is_up:
        return _Block(block.elapsed_s, block.tokens, flushes, cpu_s)
    stored = store.activations(fingerprint)
    for index, phase in enumerate(Phase):
        for layer, counts in recorder.counts.items():
            row = stored.get(phase, {}).get(layer, {})
            assert [row.get(e, 0) for e in range(counts.shape[1])] == counts[index].tolist(), "counts are missing"
    shared = store.statistics(fingerprint, 1, half_life_s=1800.0)
    assert shared is not None and np.isclose(shared.values.sum(), recorder.statistics.values.sum(), rtol=0.05)
    return _Block(block.elapsed_s, block.tokens, flushes, cpu_s)


def _run(parts: LoadedEngine, recorder: ActivationRecorder, prompts: list[list[int]], num_tokens: int) -> _Block:
    parts.dispatcher.recorder = recorder
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        request = GenerationRequest(
            request_id=RequestId(str(i)), prompt_ids=tuple(prompt), sampling=sampling, embedding=_embedding(i)
        )
        parts.engine.add(request)
    while parts.engine.has_work:
        for output in parts.engine.step():
            tokens[output.request_id].append(output.token_id)
    recorder.settle()
    return _Block(time.perf_counter() - began, list(tokens.values()))


def _embedding(index: int) -> bytes:
    """Of one of 16 kinds of prompt, far apart."""
    vector = np.zeros(16, dtype=np.int8)
    vector[index % NUM_CLUSTERS] = 127
    return vector.tobytes()


def _knowledge(layers: tuple[int, ...], num_experts: int) -> Knowledge:
    clusters = Clusters(NUM_CLUSTERS, version=1)
    clusters.centroids = np.eye(NUM_CLUSTERS, 16, dtype=np.float32)
    return make_knowledge(no_statistics(1, NUM_CLUSTERS, layers, num_experts), clusters, version=1, top_k=1)


class _Recorded:
    """What a recorder of a large model has."""

    def __init__(self, layers: int, num_experts: int) -> None:
        self.counts = {layer: np.zeros((len(Phase), num_experts), dtype=np.int64) for layer in range(layers)}
        self.statistics: ExpertStatistics = no_statistics(1, NUM_CLUSTERS, range(layers), num_experts)

    def grow(self) -> None:
        """Every expert of every layer and phase was chosen, by prompts of half the clusters."""
        for values in self.counts.values():
            values += 1
        self.statistics.values[: NUM_CLUSTERS // 2, ..., COUNT] += 1

    def drain_prompts(self) -> list[bytes]:
        return [_embedding(0)]


def _shape(parts: LoadedEngine) -> tuple[tuple[int, ...], int]:
    counts = parts.recorder.counts
    return tuple(counts), next(iter(counts.values())).shape[1]


def _interval(ratios: list[float], samples: int = 2000) -> tuple[float, float]:
    """Bootstrap 95% interval of the median of paired ratios."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(samples))
    return medians[int(0.025 * samples)], medians[int(0.975 * samples)]
