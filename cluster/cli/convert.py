"""`moesaic convert`: checkpoints in, checkpoints out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import flags
from cluster.cli.command_group import CommandGroup

app = typer.Typer(cls=CommandGroup, help="Convert checkpoints.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def convert() -> None:
    """Convert checkpoints."""


@app.command("widen")
def widen(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model to widen: directory, hub id, or moesaic-demo.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write; must not exist.")],
    factor: Annotated[int, typer.Option(help="How many times as wide the experts become.")],
    seed: Annotated[int, typer.Option(help="Of the random split.")] = 0,
    as_json: flags.AsJson = False,
) -> None:
    """Write a copy with larger experts that computes the same: realistic sizes from a small model."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from actors.convert.widen import widen_checkpoint
    from cluster.model.info import resolve_model

    source = resolve_model(src)
    columns = (TextColumn("widening"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("widening", total=None)
        report = widen_checkpoint(
            source,
            dst,
            factor=factor,
            seed=seed,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(report), default=str))
        return
    typer.echo(
        f"{report.path}: {report.num_experts} experts, {report.expert_bytes / 2**20:.1f} MiB of them "
        f"({report.total_bytes / 2**20:.1f} MiB in all), {report.num_shards} file(s), "
        f"largest relative residual {report.max_residual:.1e}"
    )
