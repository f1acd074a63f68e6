"""A worker and a host, a thread each, against one process with two threads: what the way leaves of a step."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import AutoTokenizer

from actors.attention.build import HostAccess, build_engine
from actors.data_plane.channel import HostEndpoint
from actors.engine.loaded_engine import LoadedEngine
from benchmarks.shared.command_line import progress
from benchmarks.shared.engines import begin_all
from benchmarks.shared.measuring import median
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.config.load import MoesaicConfig, load_config
from cluster.model.info import load_model_info
from cluster.types import StartupPhase

MIN_SHARE = 0.9
SHARED_CACHE = "40%"  # of the experts, in the worker's own memory: it computes while the host does
SEQUENCES = 8


def measure_steps(report: Report, path: Path, rounds: int, num_tokens: int) -> None:
    """Targets and notes. Args: rounds: of the three sides in turn; num_tokens: of each sequence."""
    info = load_model_info(str(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text).input_ids[:32] for text in prompts_of_domains(SEQUENCES)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_host_process, args=(path, theirs), daemon=True)
    process.start()
    progress("loading one process with two threads, and a worker with a host")
    endpoint: HostEndpoint = ours.recv()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = build_engine(_config(path, hosts=0), info, threads=2)
        access = HostAccess(worker_id="bench", locate=lambda _: endpoint)
        split = build_engine(_config(path, hosts=1), info, threads=1, hosts=access)
        shared = build_engine(_config(path, hosts=1, cache=SHARED_CACHE), info, threads=1, hosts=access)
        speeds: dict[str, list[float]] = {"alone": [], "split": [], "shared": []}
        shares: list[float] = []
        equal = 0.0
        for index in range(-1, rounds):
            torch.set_num_threads(2)
            speed, tokens = _run(alone, prompts, num_tokens)
            torch.set_num_threads(1)
            counters = split.dispatcher.counters  # type: ignore[attr-defined]
            before, began = counters.wait_s + counters.send_s - counters.host_s, time.perf_counter()
            other, same = _run(split, prompts, num_tokens)
            share = (counters.wait_s + counters.send_s - counters.host_s - before) / (time.perf_counter() - began)
            equal = sum(a == b for a, b in zip(tokens, same, strict=True)) / len(tokens)
            third, _ = _run(shared, prompts, num_tokens)
            progress(
                f"round {index + 1} of {rounds}: one process {speed:.1f}, worker and host {other:.1f}, "
                f"with {SHARED_CACHE} of the experts in the worker {third:.1f} tok/s"
            )
            if index >= 0:
                speeds["shared"].append(third)
                speeds["alone"].append(speed)
                speeds["split"].append(other)
                shares.append(share)
    ratio, shared_ratio = (
        median([b / a for a, b in zip(speeds["alone"], speeds[side], strict=True)]) for side in ("split", "shared")
    )
    report.notes.append(
        f"{path.name}, bfloat16, {SEQUENCES} sequences, {num_tokens} tokens each: one process with two threads "
        f"{median(speeds['alone']):.1f} tok/s; worker and host with a thread each {median(speeds['split']):.1f} tok/s; "
        f"carrier {split.links.carriers[0] if split.links else '-'}; the data plane's share of a step is "
        f"{100 * median(shares):.1f}% (waiting and sending, less what the host computed); "
        f"{100 * equal:.0f}% of the tokens are equal"
    )
    report.notes.append(
        f"the same with {SHARED_CACHE} of the experts in the worker's own memory as well: "
        f"{median(speeds['shared']):.1f} tok/s"
    )
    report.at_least("worker + host / one process, same threads", ratio, MIN_SHARE)
    report.at_least(f"the same, {SHARED_CACHE} in the worker too", shared_ratio, MIN_SHARE)
    split.dispatcher.close()
    shared.dispatcher.close()
    ours.send(None)
    process.join(timeout=10)


def _config(path: Path, *, hosts: int, cache: str = "0") -> MoesaicConfig:
    experts = {"hosts": hosts, "cache": cache if hosts else "100%", "host_threads": 1}
    return load_config(None, {"model": {"path": str(path), "dtype": "bfloat16"}, "experts": experts})


def _host_process(path: Path, commands: Connection) -> None:
    from actors.expert_host.host import ExpertHost

    host = ExpertHost(_config(path, hosts=1), load_model_info(str(path)), 0)
    host.start("127.0.0.1")
    while host.phase is not StartupPhase.READY:
        if host.error is not None:
            raise host.error
        time.sleep(0.05)
    commands.send(host.endpoint())
    commands.recv()
    host.stop()


def _run(parts: LoadedEngine, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[tuple[str, int]]]:
    """Decode tokens per second after all first tokens, and every token."""
    outputs: list[tuple[str, int]] = [(o.request_id, o.token_id) for o in begin_all(parts, prompts, num_tokens)]
    first, began = len(outputs), time.perf_counter()
    while parts.engine.has_work:
        outputs += [(o.request_id, o.token_id) for o in parts.engine.step()]
    return (len(outputs) - first) / (time.perf_counter() - began), sorted(outputs)
