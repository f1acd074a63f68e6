"""Memory and disk of the engine's process over many requests: the budget means what it says.

Runs the engine on the wide model with 25% of the experts' bytes; after every request records the process's resident
memory and the bytes that the operating system says it read from disk. The stated constant is what the process takes
besides the expert budget: Python, torch and transformers, dense weights, KV cache and buffers.

    python -m benchmarks memory [--quick] [--json] [--factor 32] [--plot memory.png]
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from actors.attention.build import build_engine
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import one_thread, read_bytes_of_process
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.config.load import load_config
from cluster.model.info import load_model_info
from cluster.types import GenerationRequest, RequestId, SamplingParams

CACHE = "25%"
CONSTANT_BYTES = 1024 * 2**20
CONCURRENCY = 4


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--factor", type=int, default=32)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="write a PNG")


def run(options: Namespace) -> Report:
    """Measure."""
    path = wide_model(options.factor)
    num_requests = options.requests or (24 if options.quick else 200)
    report = Report(f"Memory, {path.name}, expert cache {CACHE}, {num_requests} requests of 8 tokens")
    with one_thread():
        samples, budget, slot_bytes = _run(path, num_requests)
    resident, read, loads, page_cache = (np.array(column, dtype=np.float64) for column in zip(*samples, strict=True))
    for i in np.unique(np.linspace(0, len(samples) - 1, 9, dtype=int)):
        report.rows.append(
            {
                "requests": int(i + 1),
                "resident MiB": resident[i] / 2**20,
                "resident - budget MiB": (resident[i] - budget) / 2**20,
                "read from disk MiB": read[i] / 2**20,
                "loads": int(loads[i]),
                "bytes read per load / expert bytes": read[i] / max(1.0, loads[i]) / slot_bytes,
                "checkpoint in page cache MiB": page_cache[i] / 2**20,
            }
        )
    report.at_most("largest resident memory - budget, MiB", (resident.max() - budget) / 2**20, CONSTANT_BYTES / 2**20)
    half = len(samples) // 2
    report.at_most("growth over the second half, MiB", (resident[half:].max() - resident[half]) / 2**20, 32)
    report.at_most("checkpoint pages in the page cache, MiB", float(page_cache.max() / 2**20), 16)
    per_miss = (read[-1] - read[0]) / (loads[-1] - loads[0]) / slot_bytes
    report.at_least("disk bytes per load / expert bytes", float(per_miss), 0.95)
    report.at_most("disk bytes per load / expert bytes", float(per_miss), 1.05)
    if options.plot:
        _plot(options.plot, resident, read, loads, budget)
    return report


def _run(path: Path, num_requests: int) -> tuple[list[tuple[int, int, int, int]], int, int]:
    config = load_config(None, {"model": {"path": str(path), "dtype": "bfloat16"}, "experts": {"cache": CACHE}})
    info = load_model_info(str(path))
    parts = build_engine(config, info, threads=1)
    engine, store = parts.engine, parts.store
    budget_bytes = store.num_slots * store.slot_bytes
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text).input_ids[:24] for text in prompts_of_domains(min(num_requests, 64))]
    files = {part.file for expert in store.layout.experts.values() for part in expert.parts}
    at_start = read_bytes_of_process()
    samples: list[tuple[int, int, int, int]] = []
    waiting = list(range(num_requests))
    sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    while waiting or engine.has_work:
        while waiting and engine.batcher.num_running + engine.batcher.num_waiting < CONCURRENCY:
            i = waiting.pop(0)
            prompt = tuple(prompts[i % len(prompts)])
            engine.add(GenerationRequest(request_id=RequestId(str(i)), prompt_ids=prompt, sampling=sampling))
        for output in engine.step():
            if output.finish_reason is not None:
                cached = sum(_cached_bytes(file) for file in files)
                loads = store.bytes_read // store.slot_bytes  # prefetched ones included
                samples.append((_resident_bytes(), read_bytes_of_process() - at_start, loads, cached))
                if len(samples) % 20 == 0:
                    progress(f"{len(samples)} of {num_requests} requests")
    parts.dispatcher.close()
    return samples, budget_bytes, store.slot_bytes


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cached_bytes(file: Path) -> int:
    """Bytes of a file in the page cache (mincore)."""
    import ctypes
    import mmap

    size = file.stat().st_size
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as view,
    ):
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        resident = np.zeros(pages, dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_void_p(resident.ctypes.data)):
            raise OSError(ctypes.get_errno(), "mincore")
        return int((resident & 1).sum()) * mmap.PAGESIZE


def _plot(target: Path, resident: np.ndarray, read: np.ndarray, loads: np.ndarray, budget: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    requests = np.arange(1, len(resident) + 1)
    left.plot(requests, resident / 2**20, label="resident memory")
    left.axhline(budget / 2**20, color="tab:green", linestyle="--", label="expert budget")
    left.axhline((budget + CONSTANT_BYTES) / 2**20, color="tab:red", linestyle=":", label="budget + constant")
    left.set(xlabel="requests", ylabel="MiB", ylim=(0, None), title="Memory of the engine's process")
    left.legend(loc="lower right", fontsize=8)
    right.plot(loads, read / 2**20, color="tab:purple")
    right.set(xlabel="expert loads", ylabel="MiB read from disk", title="Disk reads, by the kernel's count")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
