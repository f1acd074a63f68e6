"""`moesaic serve`: checks what can be checked at once, then hands over to `cluster.app`."""

from __future__ import annotations

import time
from collections.abc import Callable

import typer

from cluster.cli import flags
from cluster.cli.serve_checks import check_settings
from cluster.cli.settings import SETTINGS, settings


@flags.in_place_of("said", settings(*SETTINGS))
def serve(*, said: flags.Said) -> None:
    """Serve MODEL (default: the embedded moesaic-demo) over the OpenAI API until interrupted."""
    report = elapsed_reporter(time.monotonic)
    config = flags.read_config(said, with_model=False)
    check_settings(config)
    report(f"starting {config.model.path}")
    from cluster.app import run_server  # brings in Ray

    raise typer.Exit(run_server(config, report))


def elapsed_reporter(clock: Callable[[], float]) -> Callable[[str], None]:
    """Prints a line with the seconds since now in front of it."""
    start_s = clock()

    def report(line: str) -> None:
        typer.echo(f"[{clock() - start_s:6.1f} s] {line}")

    return report
