"""Flags that several commands share, and how they become configuration. Reads no files itself.

Those that set fields of the configuration are in settings.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from cluster.cli.settings import overrides

if TYPE_CHECKING:
    from cluster.cli.trace_loads import Rates
    from cluster.config.load import MoesaicConfig

Url = Annotated[str | None, typer.Option(help="Use the server at this URL instead of this process.")]
ApiKey = Annotated[str | None, typer.Option(envvar="MOESAIC_API_KEY", help="Bearer token of the server.")]
OperatorKey = Annotated[
    str | None,
    typer.Option(envvar="MOESAIC_OPERATOR_KEY", help="Operator key of the server, where it has one; opens all."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Said: TypeAlias = dict[str, Any]
"""What flags said, by name; None for one that was not given."""


def in_place_of(parameter: str, flags: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that has these flags where it has `parameter`, and gets what they said there (`Said`).

    Args: flags: annotations by name. The command's parameters are given by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            said = {name: values.pop(name) for name in flags}
            command(**values, **{parameter: said})

        signature = inspect.signature(command, eval_str=True)
        shown: list[inspect.Parameter] = []
        for each in signature.parameters.values():
            if each.name == parameter:
                shown += [
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                    for name, annotation in flags.items()
                ]
            else:
                shown.append(each)
        run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in shown}
        return run

    return decorate


def read_config(said: Said, *, with_model: bool = True) -> MoesaicConfig:
    """File, environment and flags; checks that the model exists, unless the caller does (`with_model` False).

    Raises:
        ConfigError: names the field, file or model.
    """
    from cluster.config.load import load_config
    from cluster.model.info import read_model_info

    config = load_config(said.get("config"), overrides(said))
    if with_model:
        read_model_info(config.model)
    return config


PlanTrace = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="A recorded trace, instead of a running server.")
]
PlanHosts = Annotated[int, typer.Option("--hosts", min=1, help="With --trace: equal expert hosts.")]
PlanTokens = Annotated[float, typer.Option("--tokens-per-s", min=0, help="With --trace: generated in all.")]
PlanRows = Annotated[float, typer.Option("--rows", min=1, help="With --trace: decode rows of a host's batch.")]
PlanPrefillRows = Annotated[float, typer.Option("--prefill-rows", min=1, help="With --trace: prefill rows of one.")]
PlanExpertMs = Annotated[float, typer.Option("--expert-ms", min=0, help="With --trace: time of a distinct expert.")]
PlanRowMs = Annotated[float, typer.Option("--row-ms", min=0, help="With --trace: time of one row of an expert.")]
PlanLink = Annotated[float, typer.Option("--link", min=0.001, help="With --trace: GB/s at which experts are carried.")]
PlanSpare = Annotated[
    str, typer.Option("--spare", metavar="PERCENT", help="With --trace: room of a host beyond its even share.")
]


def trace_rates(
    *,
    tokens_per_s: float,
    rows: float,
    prefill_rows: float,
    expert_ms: float,
    row_ms: float,
    link: float = 1.0,
    spare: str = "0",
    horizon_s: float = 600.0,
    max_moved: str | None = None,
) -> Rates:
    """Flags of `plan --trace` and `diagnose --trace` as values.

    Raises:
        InvalidRequest: names the flag.
    """
    from cluster.cli.trace_loads import Rates
    from cluster.config.sizes import parse_size
    from cluster.errors import InvalidRequest

    try:
        share = float(spare.removesuffix("%")) / (100 if spare.endswith("%") else 1)
        max_bytes = None if max_moved is None else parse_size(max_moved)
    except ValueError as error:
        raise InvalidRequest(f"--spare or --max-moved: {error}") from error
    if share < 0:
        raise InvalidRequest(f"--spare {spare}: at least 0")
    return Rates(
        tokens_per_s=tokens_per_s,
        rows=rows,
        prefill_rows=prefill_rows,
        expert_s=expert_ms / 1e3,
        row_s=row_ms / 1e3,
        bytes_per_s=link * 1e9,
        spare=share,
        horizon_s=horizon_s,
        max_bytes=max_bytes,
    )
