"""`moesaic trace`: gate traces of a model, for replay and for the study of policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli import flags
from cluster.cli.command_group import CommandGroup
from cluster.cli.settings import settings
from cluster.errors import InvalidRequest

if TYPE_CHECKING:
    from cluster.policies.trace import GateTrace, TracedRequest

app = typer.Typer(cls=CommandGroup, help="Record and show gate traces.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def trace() -> None:
    """Record and show gate traces."""


@app.command("record")
@flags.in_place_of("said", settings("model", "expert_cache", "threads"))
def record(
    *,
    prompts: Annotated[Path, typer.Option(help="JSONL with prompt; id, domain and source are kept where given.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longer prompts are cut to their beginning.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each domain; default: all.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Prompt i draws with seed + i.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts computed together.")] = 8,
    said: flags.Said,
) -> None:
    """Generate for every prompt and write what the gates said, prompts included."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from actors.attention.build import build_engine
    from actors.engine.trace_recorder import record_trace
    from cluster.frontend.generation.tokenizer import Tokenizer
    from cluster.model.info import read_model_info
    from cluster.types import SamplingParams

    config = flags.read_config(said)
    info = read_model_info(config.model)
    requests = _read_prompts(prompts, Tokenizer.load(info.path).encode, max_prompt_tokens, limit)
    parts = build_engine(config, info, threads=config.attention.threads or 1)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("prompts", total=len(requests))
            recorded = record_trace(
                parts,
                info,
                requests,
                sampling,
                num_running=concurrency,
                on_done=lambda done: progress.update(task, completed=done),
            )
    finally:
        parts.dispatcher.close()
    recorded.save(out)
    typer.echo(f"{out}: {len(recorded.requests)} requests, {len(recorded.tokens)} rows, {out.stat().st_size} bytes")


@app.command("info")
def show(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="A recorded trace.")], as_json: flags.AsJson = False
) -> None:
    """What a trace holds."""
    from cluster.policies.trace import load_trace

    facts = _facts(load_trace(path))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    domains: dict[str, int] = facts.pop("domains")
    for name, value in facts.items():
        typer.echo(f"{name:24} {value}")
    for name, count in domains.items():
        typer.echo(f"  {name:22} {count}")


def _facts(recorded: GateTrace) -> dict[str, Any]:
    model = recorded.model
    domains = [request.domain for request in recorded.requests]
    num_decode = int(recorded.is_decode.sum())
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "layers": len(model.layers),
        "experts_per_layer": model.num_experts,
        "experts_per_token": model.top_k,
        "expert_bytes": model.expert_bytes,
        "requests": len(recorded.requests),
        "prefill_rows": len(recorded.tokens) - num_decode,
        "decode_rows": num_decode,
        "domains": {name: domains.count(name) for name in sorted(set(domains))},
    }


def _read_prompts(path: Path, encode: Any, max_tokens: int, limit: int | None) -> list[TracedRequest]:
    from cluster.policies.trace import TracedRequest

    try:
        lines = path.read_text().split("\n")  # splitlines would cut JSON strings at U+2028
    except OSError as error:
        raise InvalidRequest(f"--prompts {path}: cannot be read: {error}") from error
    requests: list[TracedRequest] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, domain = str(entry["prompt"]), str(entry.get("domain", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"--prompts {path}, line {number}: not an object with a field prompt") from error
        seen[domain] = seen.get(domain, 0) + 1
        ids = tuple(encode(prompt))[:max_tokens]
        if ids and (limit is None or seen[domain] <= limit):
            name, source = str(entry.get("id", number)), str(entry.get("source", ""))
            requests.append(TracedRequest(request_id=name, domain=domain, source=source, prompt_ids=ids))
    if not requests:
        raise InvalidRequest(f"--prompts {path}: no prompts")
    return requests
