"""Semantic routing, live: how many experts two real workers load for a generated token, by way of routing.

For every way a server of its own starts with empty memories and nothing learned: two attention workers with part of
the experts each, the others over an emulated link. The same requests of two kinds in the same order, from clients of a
closed loop; those of the first part teach it. What is counted are the workers' own counters, prompts included.

    python -m benchmarks routing_live [--quick] [--json] [--cache 50%] [--routing semantic least-loaded] [--domains D D]
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from benchmarks.shared.command_line import progress
from benchmarks.shared.models import DEMO
from benchmarks.shared.prompts import prompts_of
from benchmarks.shared.report import Report
from benchmarks.shared.served import served

SEMANTIC, LEAST, RANDOM = "semantic", "least-loaded", "random"
CLIENTS, RUNNING, TOKENS, PROMPT_TOKENS = 16, 4, 64, 48  # half of the requests wait: there is a choice to make
_SETTLE_S = 3.0  # the workers' counters are some seconds old


@dataclass(frozen=True, slots=True)
class Counters:
    """Of all workers, since start."""

    loads: int
    tokens: tuple[int, ...]


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--cache", default="50%", help="share of the experts that a worker holds")
    parser.add_argument("--routing", nargs="+", default=[SEMANTIC, LEAST, RANDOM])
    parser.add_argument("--domains", nargs="+", default=["code_python", "german"], help="files of prompts")


def run(options: Namespace) -> Report:
    """Measure."""
    past, measured = (96, 96) if options.quick else (288, 288)
    report = Report(f"Routing live: 2 workers, {options.cache} of the experts each, {CLIENTS} clients, {TOKENS} tokens")
    prompts = _prompts(past + measured, options.domains)
    loads: dict[str, float] = {}
    for routing in options.routing:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "config.yaml"
            config.write_text(_config(routing, options.cache))
            with served("--config", config) as (url, _):
                row = asyncio.run(_measure(url, prompts[:past], prompts[past:]))
        report.rows.append({"routing": routing, **row})
        progress(f"{report.rows[-1]}")
        loads[routing] = float(row["loads / token"])
    for other in options.routing[1:]:
        report.at_most(f"loads, {SEMANTIC} over {other}", loads[SEMANTIC] / loads[other], 0.9999)
    report.notes.append(f"{measured} requests measured after {past} others; every server began with empty memories")
    return report


def _config(routing: str, cache: str) -> str:
    return f"""
model: {{dtype: float32}}
attention: {{workers: 2, threads: 1, max_running: {RUNNING}}}
experts: {{cache: "{cache}", ram_tier: "100%", link_gb_per_s: 0.1}}
scheduler: {{routing: {routing}}}
"""


def _prompts(num: int, domains: list[str]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = [text for domain in domains for text in prompts_of(domain)[: num // len(domains)]]
    random.Random(0).shuffle(texts)
    return [tokenizer(text).input_ids[:PROMPT_TOKENS] for text in (texts * num)[:num]]


async def _measure(url: str, past: list[list[int]], measured: list[list[int]]) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        await _two_ready(client)
        await _ask_all(client, past)
        before = await _counters(client)
        await _ask_all(client, measured)
        after = await _counters(client)
        knowledge = (await client.get("/scheduler")).raise_for_status().json()["knowledge"] or {}
    tokens = [b - a for a, b in zip(before.tokens, after.tokens, strict=True)]
    return {
        "loads / token": (after.loads - before.loads) / sum(tokens),
        "before": before.loads / sum(before.tokens),
        "tokens, max / mean": max(tokens) * len(tokens) / sum(tokens),
        "clusters": knowledge.get("num_clusters", 0),
        "mutual information": knowledge.get("mutual_information", 0.0),
    }


async def _two_ready(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        workers = (await client.get("/status")).raise_for_status().json()["workers"]
        if sum(worker["phase"] == "ready" for worker in workers) == 2:
            return
        await asyncio.sleep(0.2)
    raise SystemExit("the second worker is not ready")


async def _ask_all(client: httpx.AsyncClient, prompts: list[list[int]]) -> None:
    left = iter(prompts)

    async def ask() -> None:
        for prompt in left:
            body = {"model": DEMO.name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
                    "ignore_eos": True}  # fmt: skip
            (await client.post("/v1/completions", json=body)).raise_for_status()

    await asyncio.gather(*(ask() for _ in range(CLIENTS)))


async def _counters(client: httpx.AsyncClient) -> Counters:
    await asyncio.sleep(_SETTLE_S)
    workers = (await client.get("/status")).raise_for_status().json()["workers"]
    workers.sort(key=lambda worker: worker["worker_id"])
    return Counters(
        sum(worker["expert_memory"]["misses"] for worker in workers),
        tuple(worker["generated_tokens"] for worker in workers),
    )
