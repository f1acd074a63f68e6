"""What HTTP costs: streaming of 8 concurrent requests against the engine's own throughput; and time to ready.

One server process tree and one engine in this process, both on one compute thread and the same wide model, measured
in turn within one run, warm. Rates are of the decode phase: tokens after everybody's first one.

    python -m benchmarks serving [--quick] [--json] [--factor 32]
"""

from __future__ import annotations

import asyncio
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import httpx
from transformers import AutoTokenizer

from benchmarks.decode.decode import decode_rate
from benchmarks.shared.command_line import progress
from benchmarks.shared.engines import resident_engine
from benchmarks.shared.measuring import median, one_thread
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from benchmarks.shared.served import served
from cluster.loadgen.sse import event_text, read_events

CONCURRENCY = 8
MIN_SHARE = 0.85
MAX_READY_S = 25.0


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--factor", type=int, default=32)


def run(options: Namespace) -> Report:
    """Measure."""
    path = wide_model(options.factor)
    rounds, num_tokens = (3, 32) if options.quick else (5, 96)
    report = Report(f"Serving, {path.name}, bfloat16, {CONCURRENCY} concurrent streams, warm, {num_tokens} tokens each")
    with served(str(path), "--threads", "1") as (url, ready_s), one_thread():
        progress(f"ready after {ready_s:.1f} s")
        _measure(report, path, url, rounds, num_tokens)
    report.at_most("start to ready, s", ready_s, MAX_READY_S)
    return report


def _measure(report: Report, path: Path, url: str, rounds: int, num_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text).input_ids[:32] for text in prompts_of_domains(CONCURRENCY)]
    parts = resident_engine(path)
    http: list[float] = []
    engine: list[float] = []
    for index in range(-1, rounds):
        through_http = asyncio.run(_stream_all(url, path.name, prompts, num_tokens))
        alone, _ = decode_rate(parts, prompts, num_tokens)
        progress(f"round {index + 1} of {rounds}: HTTP {through_http:.1f}, engine {alone:.1f} tok/s")
        if index >= 0:
            http.append(through_http)
            engine.append(alone)
    share = median([a / b for a, b in zip(http, engine, strict=True)])
    report.rows.append({"engine tok/s": median(engine), "HTTP tok/s": median(http), "share": share})
    report.at_least("HTTP streaming, share of the engine's own throughput", share, MIN_SHARE)


async def _stream_all(url: str, model: str, prompts: list[list[int]], num_tokens: int) -> float:
    """Decode tokens per second over all streams, from the time when the last one has its first token."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        started = [asyncio.Event() for _ in prompts]
        counted = [0] * len(prompts)

        async def stream(i: int) -> None:
            body = {"model": model, "prompt": prompts[i], "max_tokens": num_tokens + 1, "temperature": 0,
                    "ignore_eos": True, "stream": True, "logprobs": 0}  # fmt: skip
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for event in read_events(response.aiter_bytes()):
                    choices = event.get("choices") or [{}]
                    tokens = len((choices[0].get("logprobs") or {}).get("tokens") or ())
                    counted[i] += tokens or (1 if event_text(event) else 0)
                    started[i].set()

        streams = [asyncio.create_task(stream(i)) for i in range(len(prompts))]
        await asyncio.gather(*(event.wait() for event in started))
        before, began = sum(counted), time.perf_counter()
        await asyncio.gather(*streams)
        total = len(prompts) * (num_tokens + 1)
        return (total - before) / (time.perf_counter() - began)
