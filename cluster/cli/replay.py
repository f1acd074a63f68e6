"""`moesaic replay`: a gate trace through cache and prefetch policies, in virtual time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cluster.cli import flags
from cluster.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from cluster.replay.result import ReplayCell
    from cluster.replay.sweep import Sweep

_DEFAULT_POLICIES = (
    "lru,lru-per-layer,lfu,mrs,eam,fmoe,moesaic,belady,"
    "lru-per-layer+next-gate,eam+eam,fmoe+fmoe,moesaic+moesaic,belady+oracle"
)
_COLUMNS = {
    "policy": "policy",
    "cache": "cache",
    "link_gb_per_s": "GB/s",
    "concurrency": "seqs",
    "hit_rate": "hit",
    "timely_hit_rate": "timely",
    "gap_to_belady": "to belady",
    "loads_per_token": "loads/tok",
    "prefetch_wasted": "wasted",
    "stall_ms_per_token": "stall ms",
    "tpot_ms_p50": "TPOT p50",
    "tpot_ms_p99": "TPOT p99",
    "slowdown_to_oracle": "x oracle",
}
_Value = TypeVar("_Value", int, float)


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What to replay, from `moesaic trace record`.")],
    past: Annotated[
        Path | None,
        typer.Option(help="Another trace, to learn from; without one policies start cold, static not at all."),
    ] = None,
    cache: Annotated[str, typer.Option(help="Shares of all experts that fit.")] = "12.5%,25%,50%",
    policies: Annotated[str, typer.Option(help="EVICTION or EVICTION+PREDICTION, by comma.")] = _DEFAULT_POLICIES,
    link: Annotated[str, typer.Option(help="Rates in GB/s.")] = "0.2,1,4,16,64",
    concurrency: Annotated[str, typer.Option(help="Sequences that run together.")] = "1",
    expert_bytes: Annotated[str | None, typer.Option(help="Size of an expert (3MiB); default: as traced.")] = None,
    layer_ms: Annotated[float, typer.Option(min=0, help="Compute of a layer without experts.")] = 0.1,
    expert_ms: Annotated[float, typer.Option(min=0, help="Compute of one expert.")] = 0.1,
    row_ms: Annotated[float, typer.Option(min=0, help="Compute of one token of an expert, where that is more.")] = 0.01,
    predict_ms: Annotated[float, typer.Option(min=0, help="A forecast is there so long after its gate.")] = 0.0,
    predict_on_path: Annotated[bool, typer.Option(help="Compute waits for forecasts.")] = False,
    as_json: flags.AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG to draw.")] = None,
) -> None:
    """Hit rates, bytes and times of policies over a trace: discrete events, the live policy code."""
    from actors.kernels.search import load_search
    from cluster.config.sizes import parse_size
    from cluster.policies.build import PolicySettings
    from cluster.policies.trace import load_trace
    from cluster.replay.machine import Processor
    from cluster.replay.result import compute_bound, with_bounds
    from cluster.replay.sweep import Sweep, learn_past, replay_cells

    try:
        size = None if expert_bytes is None else parse_size(expert_bytes)
    except ValueError as error:
        raise InvalidRequest(f"--expert-bytes: {error}") from error
    recorded = load_trace(trace)
    sweep = Sweep(
        policies=[name.strip() for name in policies.split(",")],
        caches=_numbers("--cache", cache, _share),
        links=_numbers("--link", link, float),
        concurrencies=_numbers("--concurrency", concurrency, int),
        expert_bytes=size,
        processor=Processor(
            base_s=layer_ms / 1e3,
            expert_s=expert_ms / 1e3,
            row_s=row_ms / 1e3,
            predict_s=predict_ms / 1e3,
            predict_on_path=predict_on_path,
        ),
        settings=PolicySettings(kernels=load_search()),
    )
    learned = None
    if past is not None:
        earlier = load_trace(past)
        if earlier.model.fingerprint != recorded.model.fingerprint:
            raise ConfigError(
                f"--past {past}: of the model {earlier.model.fingerprint}, {trace} is of {recorded.model.fingerprint}"
            )
        learned = learn_past(earlier, sweep)
    found = _with_progress(sweep, replay_cells(recorded, learned, sweep))
    cells = with_bounds(sorted(found, key=lambda cell: (cell.concurrency, cell.cache, cell.link_gb_per_s)))
    if plot is not None:
        from cluster.replay.plot import draw

        draw(cells, plot)
    if as_json:
        rows, bound = [cell.as_row() for cell in cells], [asdict(machine) for machine in compute_bound(cells)]
        typer.echo(json.dumps({"trace": str(trace), "cells": rows, "compute_bound": bound}))
    else:
        _print(cells)
        for machine in compute_bound(cells):
            typer.echo(str(machine))


def _with_progress(sweep: Sweep, cells: Iterable[ReplayCell]) -> list[ReplayCell]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("replays"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        return list(progress.track(cells, total=sweep.num_cells, description="replays"))


def _print(cells: list[ReplayCell]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*_COLUMNS.values())
    for cell in cells:
        values = cell.as_row()
        table.add_row(*(_shown(values[name]) for name in _COLUMNS))
    Console(width=140).print(table)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _numbers(flag: str, text: str, parse: Callable[[str], _Value]) -> list[_Value]:
    try:
        numbers = [parse(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(f"{flag} {text}: not a list of numbers") from error
    if min(numbers) <= 0:
        raise InvalidRequest(f"{flag} {text}: all must be above 0")
    return numbers
