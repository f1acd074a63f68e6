"""The `moesaic` command. Imports of a command's own needs happen inside it, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli import bench, chat, config, convert, diagnose, drain, fit, generate, plan, replay, serve, status, trace
from cluster.cli.command_group import CommandGroup

app = typer.Typer(
    name="moesaic",
    cls=CommandGroup,
    help="Serve Mixture-of-Experts language models whose experts do not all fit in fast memory.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("status")(status.status)
app.command("fit")(fit.fit)
app.command("config")(config.config)
app.command("drain")(drain.drain)
app.command("plan")(plan.plan)
app.command("diagnose")(diagnose.diagnose)
app.command("replay")(replay.replay)
app.add_typer(bench.app, name="bench")
app.add_typer(convert.app, name="convert")
app.add_typer(trace.app, name="trace")


def main() -> None:
    """Entry point of the distribution's `moesaic` script."""
    from cluster.process_environment import settle_environment

    settle_environment()
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("moesaic")
        except PackageNotFoundError:  # run from a checkout that is not installed
            number = "unknown (not installed)"
        typer.echo(f"moesaic {number}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `moesaic` itself."""


if __name__ == "__main__":
    main()
