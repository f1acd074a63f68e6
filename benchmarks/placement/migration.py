"""Experts move between hosts under load: what a step costs meanwhile, what is moved, and that nobody notices.

One attention worker in this process, expert hosts and the migration as Ray actors, on this machine; sequences decode
all the time, in float32. Quiet stretches and migrations take turns: in each, a third of the layers' experts go to the
next host (and back in the following one), throttled to last some seconds. Steps that begin a sequence are left out of
the times; every sequence is compared with the same one over hosts that nothing was moved between.

    python -m benchmarks migration [--quick] [--json] [--factor 8] [--hosts 3]
"""

from __future__ import annotations

import threading
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from transformers import AutoTokenizer

from actors.attention.build import HostAccess, build_engine
from actors.engine.loaded_engine import LoadedEngine
from actors.expert_client.dispatch import HostDispatcher
from actors.ray_shells.host_actor import locate_host, start_expert_hosts
from actors.ray_shells.host_calls import RayHosts, expert_hosts, find_host
from benchmarks.shared.command_line import progress
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.application import ApplicationId
from cluster.config.load import MoesaicConfig, load_config
from cluster.control.migrator import MigrationRunner, MigrationStatus
from cluster.deployed_spec import specify
from cluster.model.info import read_model_info
from cluster.placement import even_placement
from cluster.placement.migration import MigrationPhase
from cluster.placement.plan import Placement
from cluster.status.reports import HostReport
from cluster.types import GenerationRequest, RequestId, SamplingParams

SEQUENCES = 4
TOKENS = 64
MAX_P99 = 1.5
_EXCHANGE_S = 0.25
_TIMEOUT_S = 300.0


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--factor", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=3)


def run(options: Namespace) -> Report:
    """Measure."""
    rounds, seconds = (2, 8.0) if options.quick else (6, 20.0)
    report = Report(f"Migration under load, {SEQUENCES} sequences over {options.hosts} hosts")
    path = wide_model(options.factor)
    config = load_config(
        None,
        {
            "model": {"path": str(path), "dtype": "float32", "max_model_len": 512},
            "experts": {"hosts": options.hosts, "cache": "0", "host_threads": 1},
            "attention": {"threads": 1},
        },
    )
    ray.init(address="local", namespace=config.ray.namespace, include_dashboard=False, log_to_driver=False, num_cpus=4)
    try:
        _run(report, config, path, rounds, seconds)
    finally:
        expert_hosts(config.ray.application_id).end()
        ray.shutdown()
    return report


class Mover:
    """The scheduler's part: a Ray actor around a MigrationRunner, asked by the worker as reports ask a scheduler."""

    def __init__(self, application: ApplicationId, placement: Placement, bytes_per_s: float) -> None:
        self._epoch = 0
        self._runner = MigrationRunner(
            RayHosts(application),
            placement,
            on_publish=lambda _: None,
            worker_epochs=lambda: {"worker": self._epoch},
            bytes_per_s=bytes_per_s,
        )
        self._runner.begin()

    def exchange(self, epoch: int) -> Placement | None:
        """A worker follows `epoch`; what it is to follow, if that is another one."""
        self._epoch = epoch
        return self._runner.placement if self._runner.placement.epoch > epoch else None

    def start(self, target: Placement, capacities: Mapping[int, int], expert_bytes: int) -> bool:
        return self._runner.start(target, capacities=capacities, expert_bytes=expert_bytes)

    def status(self) -> MigrationStatus:
        return self._runner.status()


@dataclass
class Load:
    """Sequences that decode all the time; one that ends is followed by the next prompt."""

    parts: LoadedEngine
    prompts: list[tuple[int, ...]]
    started: int = 0
    answers: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    failed: int = 0

    def step(self) -> float | None:
        """Seconds of one step; None if a sequence began in it."""
        engine, begins = self.parts.engine, False
        while engine.batcher.num_running + engine.batcher.num_waiting < SEQUENCES:
            self._begin()
            begins = True
        began = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - began
        for output in outputs:
            self.failed += output.error is not None
            self.answers[output.request_id].append(output.token_id)
        return None if begins else seconds

    def _begin(self) -> None:
        request_id = RequestId(str(self.started))
        prompt = self.prompts[self.started % len(self.prompts)]
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        self.answers[request_id] = []
        self.parts.engine.add(GenerationRequest(request_id=request_id, prompt_ids=prompt, sampling=sampling))
        self.started += 1


def _run(report: Report, config: MoesaicConfig, path: Path, rounds: int, seconds: float) -> None:
    info = read_model_info(config.model)
    application, num_hosts = config.ray.application_id, config.experts.hosts
    start_expert_hosts(specify(config, None))
    progress(f"starting {num_hosts} hosts")
    access = HostAccess(worker_id="bench", locate=partial(locate_host, application))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = build_engine(config, info, threads=1, hosts=access)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tuple(tokenizer(text).input_ids[:32]) for text in prompts_of_domains(SEQUENCES * 2)]
    hosts = [find_host(application, index) for index in range(num_hosts)]
    reports: list[HostReport] = ray.get([host.report.remote() for host in hosts])
    layout = parts.layout
    first = dict(enumerate(even_placement(layout.layers, layout.num_experts, num_hosts)))
    expert_bytes = reports[0].expert_bytes
    moved = sum(len(first[i][layer]) for i in first for layer in layout.layers[::3])
    mover: Any = ray.remote(Mover).options(num_cpus=0, max_concurrency=4)
    mover = mover.remote(application, Placement(epoch=1, hosts=first), moved * expert_bytes / seconds)
    reference = _reference(parts, prompts)
    ended = threading.Event()
    threading.Thread(target=_exchange, args=(mover, parts, ended), daemon=True).start()
    load = Load(parts, prompts)
    quiet: list[float] = []
    busy: list[float] = []
    statuses: list[MigrationStatus] = []
    capacities = {i: each.capacity for i, each in enumerate(reports)}
    try:
        for turn in range(rounds):
            quiet += _steps_for(load, seconds)
            target = first if turn % 2 else _shifted(first, layout.layers[::3])
            busy += _migrate(load, mover, Placement(epoch=0, hosts=target), capacities, expert_bytes)
            statuses.append(ray.get(mover.status.remote()))
            progress(_told(turn, rounds, statuses[-1], quiet, busy))
        quiet += _steps_for(load, seconds)
    finally:
        ended.set()
    _report(report, load, reference, quiet, busy, statuses)
    parts.dispatcher.close()


def _exchange(mover: Any, parts: LoadedEngine, ended: threading.Event) -> None:
    assert parts.links is not None
    while not ended.wait(_EXCHANGE_S):
        placement: Placement | None = ray.get(mover.exchange.remote(parts.links.epoch))
        if placement is not None:
            parts.links.set_placement(placement)


def _reference(parts: LoadedEngine, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Answers to all prompts while nothing moves."""
    load = Load(parts, prompts)
    while load.started < len(prompts) or parts.engine.has_work:
        if load.started < len(prompts):
            load.step()
        else:
            for output in parts.engine.step():
                load.answers[output.request_id].append(output.token_id)
    return [load.answers[str(i)] for i in range(len(prompts))]


def _steps_for(load: Load, seconds: float) -> list[float]:
    end_s = time.monotonic() + seconds
    times: list[float] = []
    while time.monotonic() < end_s:
        took_s = load.step()
        times += [] if took_s is None else [took_s]
    return times


def _migrate(
    load: Load, mover: Any, target: Placement, capacities: Mapping[int, int], expert_bytes: int
) -> list[float]:
    """Step until experts are where `target` says; the times of the steps."""
    assert ray.get(mover.start.remote(target, capacities, expert_bytes))
    times: list[float] = []
    end_s, asked = time.monotonic() + _TIMEOUT_S, mover.status.remote()
    while time.monotonic() < end_s:
        took_s = load.step()
        times += [] if took_s is None else [took_s]
        if ray.wait([asked], timeout=0)[0]:
            status: MigrationStatus = ray.get(asked)
            if status.phase not in (MigrationPhase.PREPARING, MigrationPhase.SWITCHING):
                return times
            asked = mover.status.remote()
    raise TimeoutError(f"the migration did not end within {_TIMEOUT_S:.0f} s")


def _shifted(
    owned: Mapping[int, Mapping[int, tuple[int, ...]]], layers: tuple[int, ...]
) -> dict[int, dict[int, tuple[int, ...]]]:
    """Of some layers every host gets what the next one owns."""
    return {
        host: {layer: owned[(host + 1) % len(owned) if layer in layers else host][layer] for layer in mine}
        for host, mine in owned.items()
    }


def _told(turn: int, rounds: int, status: MigrationStatus, quiet: list[float], busy: list[float]) -> str:
    return (
        f"round {turn + 1} of {rounds}: {status.phase}, "
        f"{status.moved_bytes / 2**20:.1f} MiB in {status.seconds:.1f} s; "
        f"p99 step so far {_p99(quiet):.1f} ms quiet, {_p99(busy):.1f} ms moving"
    )


def _report(
    report: Report,
    load: Load,
    reference: list[list[int]],
    quiet: list[float],
    busy: list[float],
    statuses: list[MigrationStatus],
) -> None:
    complete = {i: tokens for i, tokens in load.answers.items() if len(tokens) == TOKENS}
    equal = sum(tokens == reference[int(i) % len(reference)] for i, tokens in complete.items())
    for name, times in (("quiet", quiet), ("moving", busy)):
        report.rows.append(
            {
                "steps": name,
                "count": len(times),
                "median ms": 1e3 * float(np.median(times)),
                "p95 ms": 1e3 * float(np.percentile(times, 95)),
                "p99 ms": _p99(times),
                "max ms": 1e3 * max(times),
            }
        )
    dispatcher = load.parts.dispatcher
    assert isinstance(dispatcher, HostDispatcher)
    counters = dispatcher.counters
    moved, planned = (sum(getattr(each, name) for each in statuses) for name in ("moved_bytes", "planned_bytes"))
    report.notes.append(
        f"{len(statuses)} migrations, {moved / 2**20:.1f} MiB moved, {planned / 2**20:.1f} planned, "
        f"{sum(each.seconds for each in statuses) / len(statuses):.1f} s each; placement epoch {statuses[-1].epoch}; "
        f"{len(complete)} sequences of {TOKENS} tokens, {equal} of them equal to those without a migration; "
        f"{counters.redispatched} parts sent anew, {counters.hedged} of them because a host was slow, "
        f"{counters.fallbacks} computed in the worker"
    )
    report.at_most("failed requests", load.failed, 0)
    report.at_least("share of sequences with the same tokens", equal / max(1, len(complete)), 1.0)
    report.at_least("migrations that ended", sum(s.phase is MigrationPhase.DONE for s in statuses) / len(statuses), 1.0)
    report.at_most("bytes moved / planned", moved / max(1, planned), 1.0)
    report.at_most("p99 step, moving / quiet", _p99(busy) / _p99(quiet), MAX_P99)


def _p99(times: list[float]) -> float:
    return 1e3 * float(np.percentile(times, 99)) if times else 0.0
