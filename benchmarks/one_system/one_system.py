"""One worker and two expert hosts, beside one process with the same bytes of expert memory, and beside LRU.

Every process has its experts in RAM, and a part of them in its fast memory behind a declared link. The first half of
every domain's prompts warms all sides alike; the rest is measured. Work is counted before time. Times mean little where
worker and hosts have no core each: then they are printed and not judged.

python -m benchmarks one_system [--quick] [--json] [--markdown]
"""

from __future__ import annotations

import contextlib
import os
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from actors.attention.build import HostAccess, build_engine
from actors.engine.loaded_engine import LoadedEngine
from actors.expert_client.dispatch import HostDispatcher
from benchmarks.offload.engine import fill_ram
from benchmarks.one_system.host_process import HostProcess, host_processes
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import median
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import SHARED_PROMPTS, entries_of
from benchmarks.shared.report import Report, Row
from cluster.config.load import load_config
from cluster.model.info import ModelInfo, load_model_info
from cluster.types import GenerationRequest, RequestId, SamplingParams

FACTOR, HOSTS, HOST_GB_PER_S = 32, 2, 2.0
MAX_LEN, PROMPT_TOKENS = 256, 64
SIDES = (("one process", "moesaic+moesaic"), ("hosts", "moesaic+moesaic"), ("hosts", "lru+none"))
_CORES_NEEDED = 1 + HOSTS


@dataclass(frozen=True, slots=True)
class _Counts:
    misses: int
    hits: int
    prefetch_bytes: int


@dataclass(frozen=True, slots=True)
class _Side:
    parts: LoadedEngine
    hosts: Sequence[HostProcess]

    def counts(self) -> _Counts:
        if not self.hosts:
            counters = self.parts.store.counters
            return _Counts(counters.num_misses, counters.num_hits, sum(counters.prefetch_bytes.values()))
        said = [host.memory() for host in self.hosts]
        return _Counts(
            sum(memory.misses for memory in said),
            sum(memory.hits for memory in said),
            sum(sum(memory.prefetch_bytes.values()) for memory in said),
        )

    def outlook_share(self) -> float | None:
        dispatcher = self.parts.dispatcher
        if not isinstance(dispatcher, HostDispatcher) or dispatcher.memory is None:
            return None
        said = dispatcher.memory.bytes
        return said.taken_bytes / max(said.frame_bytes, 1)


def run(options: Namespace) -> Report:
    """Measure."""
    per_domain, every, num_new = (1, 3, 24) if options.quick else (4, 1, 48)
    path = wide_model(FACTOR)
    info = load_model_info(str(path), max_model_len=MAX_LEN)
    tokenizer = AutoTokenizer.from_pretrained(path)
    past, held_out = (
        [tokenizer(text).input_ids[:PROMPT_TOKENS] for text in texts] for texts in _halves(per_domain, every)
    )
    report = Report(f"One worker and {HOSTS} hosts, {path.name}, {HOST_GB_PER_S:g} GB/s into each host's fast memory")
    for share in (0.25, 0.5):
        for concurrency in (1, 8):
            rows = [_measure(info, side, share, concurrency, (past, held_out), num_new) for side in SIDES]
            report.rows += rows
            _judge(report, rows, share, concurrency)
    if (os.cpu_count() or 1) < _CORES_NEEDED:
        report.notes.append(
            f"times are not measurable here: {_CORES_NEEDED} processes compute, and there are {os.cpu_count()} cores"
        )
    return report


def _judge(report: Report, rows: Sequence[Row], share: float, concurrency: int) -> None:
    single, ours, lru = rows
    name = f"{share:.0%}, {concurrency} sequences"
    report.at_most(f"{name}: loads waited for, over one process", ours["loads a token"] / single["loads a token"], 1.05)
    report.at_most(f"{name}: outlooks, share of the data plane's bytes", ours["outlook share"], 0.03)
    ratio = ours["ms a token"] / lru["ms a token"]
    bound = {(0.25, 1): 0.85, (0.25, 8): 0.75, (0.5, 1): 0.85, (0.5, 8): 0.5}[share, concurrency]
    if (os.cpu_count() or 1) >= _CORES_NEEDED:
        report.at_most(f"{name}: time per token over LRU without prefetch", ratio, bound)
    else:
        report.notes.append(f"{name}: time per token over LRU without prefetch {ratio:.2f} (wanted {bound:g})")


def _halves(per_domain: int, every: int) -> tuple[list[str], list[str]]:
    """Prompts of each `every`-th domain: from the first half of its file, and from the second."""
    if not SHARED_PROMPTS.is_dir():
        raise SystemExit(f"{SHARED_PROMPTS} is not there; this benchmark needs the shared prompts")
    past: list[str] = []
    held_out: list[str] = []
    for file in sorted(SHARED_PROMPTS.glob("*.jsonl"))[::every]:
        prompts = [entry["prompt"] for entry in entries_of(file)]
        middle = len(prompts) // 2
        past += prompts[:per_domain]
        held_out += prompts[middle : middle + per_domain]
    return past, held_out


def _measure(
    info: ModelInfo,
    side: tuple[str, str],
    share: float,
    concurrency: int,
    prompts: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    num_new: int,
) -> Row:
    """Args: prompts: to warm with, and to measure. num_new: tokens of each answer."""
    (place, policy), (past, held_out) = side, prompts
    with _opened(info, place == "hosts", policy, share) as opened:
        _decode(opened.parts, past, concurrency, num_new)
        before = opened.counts()
        step_s, num_tokens = _decode(opened.parts, held_out, concurrency, num_new)
        after = opened.counts()
        misses, hits = after.misses - before.misses, after.hits - before.hits
        row: Row = {
            "experts in": place,
            "policy": policy,
            "memory": f"{share:.0%}",
            "sequences": concurrency,
            "loads a token": misses / num_tokens,
            "hit rate": hits / max(hits + misses, 1),
            "MB ahead a token": (after.prefetch_bytes - before.prefetch_bytes) / num_tokens / 1e6,
            "ms a token": 1e3 * median(step_s),
            "outlook share": opened.outlook_share(),
        }
        progress(
            ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else str(value) for key, value in row.items())
        )
        return row


@contextlib.contextmanager
def _opened(info: ModelInfo, has_hosts: bool, policy: str, share: float) -> Iterator[_Side]:
    """Args: share: of all experts, over all processes together."""
    eviction, _, prediction = policy.partition("+")
    experts: dict[str, Any] = {"eviction": eviction, "prediction": prediction, "ram_tier": "100%"}
    sections: dict[str, Any] = {
        "model": {"path": str(info.path), "dtype": "bfloat16", "max_model_len": MAX_LEN},
        "attention": {"kv_cache": "32MiB"},
    }
    if not has_hosts:
        sections["experts"] = experts | {"cache": f"{100 * share:g}%", "link_gb_per_s": HOSTS * HOST_GB_PER_S}
        parts = build_engine(load_config(None, sections), info, threads=1)
        try:
            fill_ram(parts)
            yield _Side(parts, ())
        finally:
            parts.dispatcher.close()
        return
    sections["experts"] = experts | {
        "cache": "0",
        "hosts": HOSTS,
        "host_cache": f"{100 * share / HOSTS:g}%",
        "host_threads": 1,
        "link_gb_per_s": HOST_GB_PER_S,
    }
    with host_processes(str(info.path), HOSTS, sections, max_len=MAX_LEN) as hosts:
        endpoints = [host.endpoint() for host in hosts]
        access = HostAccess(worker_id="benchmark", locate=lambda index: endpoints[index])
        parts = build_engine(load_config(None, sections), info, threads=1, hosts=access)
        try:
            yield _Side(parts, hosts)
        finally:
            parts.dispatcher.close()


def _decode(
    parts: LoadedEngine, prompts: Sequence[Sequence[int]], concurrency: int, num_new: int
) -> tuple[list[float], int]:
    """Answer all prompts, so many at a time; seconds of each step per token of it, and tokens."""
    sampling = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    waiting = list(enumerate(prompts))
    running, num_tokens, token_s = 0, 0, list[float]()
    while waiting or parts.engine.has_work:
        while waiting and running < concurrency:
            index, prompt = waiting.pop(0)
            parts.engine.add(
                GenerationRequest(request_id=RequestId(str(index)), prompt_ids=tuple(prompt), sampling=sampling)
            )
            running += 1
        began_s = time.perf_counter()
        outputs = parts.engine.step()
        if outputs:
            token_s.append((time.perf_counter() - began_s) / len(outputs))
        num_tokens += len(outputs)
        running -= sum(output.finish_reason is not None for output in outputs)
    return token_s, num_tokens
