"""Decode speed of our engine against `transformers` generate: same model, prompts, dtype and one thread each.

Alternates the two sides within one run, warm (all experts resident), and prints medians, the ratio and the share
of the bound: bytes of the distinct experts and dense weights a step must read, over measured memory bandwidth.

    python -m benchmarks decode [--quick] [--json] [--factor 32] [--model DIR]
"""

from __future__ import annotations

import time
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.engine.loaded_engine import LoadedEngine
from benchmarks.shared.command_line import progress
from benchmarks.shared.engines import begin_all, resident_engine
from benchmarks.shared.measuring import median, memory_bandwidth, one_thread
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.model.info import load_model_info

CONCURRENCY = (1, 8)
MIN_RATIO = {1: 1.8, 8: 2.0}


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--factor", type=int, default=32, help="how much wider than the demo model the experts are")
    parser.add_argument("--model", type=Path, help="another model directory")


def run(options: Namespace) -> Report:
    """Measure."""
    path = options.model or (wide_model(options.factor) if options.factor > 1 else load_model_info("moesaic-demo").path)
    rounds, num_tokens = (3, 24) if options.quick else (7, 64)
    report = Report(f"Decode, {path.name}, bfloat16, one thread each side, warm, {num_tokens} tokens per sequence")
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        prompts = [tokenizer(text).input_ids[:32] for text in prompts_of_domains(max(CONCURRENCY))]
        progress("loading both sides")
        parts = resident_engine(path)
        reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        bandwidth = memory_bandwidth()
        for concurrency in CONCURRENCY:
            _compare(report, parts, reference, tokenizer, prompts[:concurrency], rounds, num_tokens, bandwidth)
        parts.dispatcher.close()
    report.notes.append(f"memory read bandwidth of one core: {bandwidth / 1e9:.1f} GB/s; expert kernel: {parts.kernel}")
    return report


def _compare(
    report: Report,
    parts: LoadedEngine,
    reference: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    rounds: int,
    num_tokens: int,
    bandwidth: float,
) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    bounds: list[float] = []
    for index in range(-1, rounds):  # round -1 warms both sides up and fills the expert memory
        speed, bytes_per_step = decode_rate(parts, prompts, num_tokens)
        other = _run_transformers(reference, tokenizer, prompts, num_tokens)
        progress(
            f"{len(prompts)} sequences, round {index + 1} of {rounds}: ours {speed:.1f}, transformers {other:.1f} tok/s"
        )
        if index >= 0:
            ours.append(speed)
            theirs.append(other)
            bounds.append(len(prompts) * bandwidth / bytes_per_step)
    ratio = median([a / b for a, b in zip(ours, theirs, strict=True)])
    report.rows.append(
        {
            "sequences": len(prompts),
            "moesaic tok/s": median(ours),
            "transformers tok/s": median(theirs),
            "ratio": ratio,
            "bound tok/s": median(bounds),
            "share of bound": median(ours) / median(bounds),
            "MB read per step": len(prompts) * bandwidth / median(bounds) / 1e6,
        }
    )
    report.at_least(f"{len(prompts)} sequences: ratio to transformers", ratio, MIN_RATIO[len(prompts)])


def decode_rate(parts: LoadedEngine, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
    """Decode tokens per second after all first tokens, and bytes of weights a step reads."""
    engine, store = parts.engine, parts.store
    begin_all(parts, prompts, num_tokens)
    used_before, steps_before = store.counters.num_hits + store.counters.num_misses, engine.counters.steps
    tokens, began = 0, time.perf_counter()
    while engine.has_work:
        tokens += len(engine.step())
    elapsed_s = time.perf_counter() - began
    steps = engine.counters.steps - steps_before
    experts = store.counters.num_hits + store.counters.num_misses - used_before
    dense = sum(p.numel() * p.element_size() for p in engine.runner.model.parameters() if not p.is_meta)
    return tokens / elapsed_s, experts * store.slot_bytes / steps + dense


def _run_transformers(model: Any, tokenizer: Any, prompts: list[list[int]], num_tokens: int) -> float:
    """Decode tokens per second: the time of a long run less that of one that only makes the first token."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")

    def timed(count: int) -> float:
        began = time.perf_counter()
        model.generate(**batch, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - began

    first_s = timed(1)
    return len(prompts) * num_tokens / (timed(num_tokens + 1) - first_s)
