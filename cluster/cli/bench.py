"""`moesaic bench`: load on a running server, and what came of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import flags
from cluster.cli.command_group import CommandGroup
from cluster.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cluster.loadgen.arrivals import Schedule
    from cluster.loadgen.client import LoadClient, LoadRequest, RequestTiming

app = typer.Typer(cls=CommandGroup, help="Measure a server.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Measure a server."""


@app.command("serve")
def bench_serve(
    url: Annotated[str, typer.Option(help="Server to measure.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name; default: the first one served.")] = None,
    api_key: flags.ApiKey = None,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals, requests per second.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Closed loop with this many clients.")] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV: arrival_s, input_tokens, output_tokens.")] = None,
    time_scale: Annotated[float, typer.Option(help="Factor on the times of --trace.")] = 1.0,
    num_requests: Annotated[int | None, typer.Option(help="Default 32, or the whole --trace.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, where --trace says nothing.")] = 64,
    input_tokens: Annotated[int | None, typer.Option(help="Cut or repeat prompts to this length.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSONL with a field prompt; default: bundled ones.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="MODEL for exact prompt lengths; default: estimate.")] = None,
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Always generate all tokens.")] = True,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Objective for the first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Objective per further token.")] = None,
    slo_e2e_ms: Annotated[float | None, typer.Option(help="Objective for the whole answer.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for one answer.")] = 600.0,
    as_json: flags.AsJson = False,
) -> None:
    """Send requests and print latencies, throughput and goodput."""
    from cluster.cli.server_client import fetch_model_name
    from cluster.loadgen.client import LoadClient
    from cluster.loadgen.report import Objectives, build_report

    schedule = _schedule(rate, concurrency, trace, time_scale, num_requests, seed)
    requests = _requests(schedule, prompts, max_tokens, input_tokens, tokenizer)
    name = model or fetch_model_name(url, api_key=api_key)
    client = LoadClient(url, model=name, api_key=api_key, timeout_s=timeout_s, ignore_eos=ignore_eos)
    timings, duration_s = asyncio.run(_run(client, schedule, requests))
    objectives = Objectives(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms, e2e_ms=slo_e2e_ms)
    report = build_report(timings, duration_s=duration_s, objectives=objectives)
    if as_json:
        typer.echo(json.dumps({"url": url, "model": name, **report.to_json()}))
    else:
        from rich.console import Console

        Console().print(report.to_table())
    if report.num_completed == 0:
        raise typer.Exit(1)


def _schedule(
    rate: float | None,
    concurrency: int | None,
    trace: Path | None,
    time_scale: float,
    num_requests: int | None,
    seed: int,
) -> Schedule:
    from cluster.loadgen.arrivals import closed_loop, poisson, read_trace

    if sum(option is not None for option in (rate, concurrency, trace)) > 1:
        raise InvalidRequest("--rate, --concurrency and --trace exclude each other; give one")
    if num_requests is not None and num_requests < 1:
        raise InvalidRequest(f"--num-requests must be at least 1, got {num_requests}")
    if trace is not None:
        return read_trace(trace, time_scale=time_scale, num_requests=num_requests)
    count = 32 if num_requests is None else num_requests
    if rate is not None:
        return poisson(rate_per_s=rate, num_requests=count, seed=seed)
    return closed_loop(concurrency=1 if concurrency is None else concurrency, num_requests=count)


def _requests(
    schedule: Schedule, prompts: Path | None, max_tokens: int, input_tokens: int | None, tokenizer: str | None
) -> list[LoadRequest]:
    from cluster.loadgen.client import LoadRequest
    from cluster.loadgen.prompts import BUNDLED_PROMPTS, fit_prompt, fit_prompt_by_words, read_prompts, take_prompts

    codec = _load_tokenizer(tokenizer) if tokenizer is not None else None

    def fitted(prompt: str, wanted: int | None) -> str:
        if wanted is None:
            return prompt
        if codec is None:
            return fit_prompt_by_words(prompt, wanted)
        return fit_prompt(prompt, wanted, encode=partial(_encode, codec), decode=partial(_decode, codec))

    texts = take_prompts(read_prompts(prompts) if prompts else BUNDLED_PROMPTS, len(schedule.arrivals))
    return [
        LoadRequest(
            prompt=fitted(text, arrival.input_tokens or input_tokens), max_tokens=arrival.output_tokens or max_tokens
        )
        for text, arrival in zip(texts, schedule.arrivals, strict=True)
    ]


def _encode(codec: Tokenizer, text: str) -> Sequence[int]:
    return codec.encode(text, add_special_tokens=False).ids


def _decode(codec: Tokenizer, ids: Sequence[int]) -> str:
    return codec.decode(list(ids))


def _load_tokenizer(model: str) -> Tokenizer:
    from tokenizers import Tokenizer

    from cluster.model.info import resolve_model

    path = resolve_model(model) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: file is missing; --tokenizer needs a model with tokenizer.json")
    return Tokenizer.from_file(str(path))


async def _run(
    client: LoadClient, schedule: Schedule, requests: list[LoadRequest]
) -> tuple[list[RequestTiming], float]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cluster.loadgen.client import run_load

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=len(requests))
        async with client:
            return await run_load(client, schedule, requests, on_done=lambda _: progress.advance(task))
