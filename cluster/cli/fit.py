"""`moesaic fit`: whether a model fits on these nodes, from its config.json alone, and what to set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli import flags
from cluster.cli.settings import SETTINGS
from cluster.errors import InvalidRequest

if TYPE_CHECKING:
    from cluster.model.sizing import Machines, ModelShape, Sizing


def fit(
    model: Annotated[str, typer.Argument(help="Folder, hub id (only config.json is fetched), or moesaic-demo.")],
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each node: 64GiB.")],
    nodes: Annotated[int, typer.Option(min=1, help="Equal nodes.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Attention workers in all.")] = 1,
    hosts: Annotated[
        int | None, typer.Option(min=0, help="Expert hosts in all; default: one a node where there are several.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="auto|bfloat16|float32", help="As the server computes.")] = "auto",
    max_model_len: Annotated[int | None, SETTINGS["max_model_len"].option] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Bytes of MODEL per worker and expert host, whether they fit, and what to set. Ends with 1 where they do not."""
    from dataclasses import asdict

    from actors.model.shape import read_shape
    from cluster.config.sizes import parse_size
    from cluster.model import sizing as sizes
    from cluster.model.info import read_sizes

    if dtype not in ("auto", "bfloat16", "float32"):
        raise InvalidRequest(f"--dtype {dtype}: one of auto, bfloat16, float32")
    try:
        node_bytes = parse_size(memory)
    except ValueError as error:
        raise InvalidRequest(f"--memory: {error}") from error
    shape = read_shape(read_sizes(model, max_model_len=max_model_len), dtype)
    num_hosts = (nodes if nodes > 1 else 0) if hosts is None else hosts
    machines = sizes.Machines(nodes=nodes, node_bytes=node_bytes, workers=workers, hosts=num_hosts)
    sizing = sizes.fit(shape, machines, max_model_len=max_model_len)
    if as_json:
        typer.echo(json.dumps({"shape": asdict(shape), "machines": asdict(machines), "sizing": asdict(sizing)}))
    else:
        for line in sizing_lines(shape, machines, sizing):
            typer.echo(line)
    if not sizing.fits:
        raise typer.Exit(1)


def sizing_lines(shape: ModelShape, machines: Machines, sizing: Sizing) -> list[str]:
    """What the command prints."""
    from cluster.model.sizing import in_gib

    count = shape.num_layers * shape.num_experts
    lines = [
        f"model: {count} routed experts of {in_gib(shape.expert_bytes)}, {in_gib(shape.all_experts_bytes)} in all",
        f"each worker ({machines.workers}): dense weights {in_gib(sizing.dense_bytes)}, KV cache "
        f"{in_gib(sizing.kv_bytes)}, expert cache {in_gib(sizing.cache_bytes)}, RAM tier none",
    ]
    if machines.hosts:
        lines.append(f"each expert host ({machines.hosts}): {in_gib(sizing.host_bytes)} of experts")
    lines.append(
        f"the fullest node: {in_gib(sizing.planned_bytes)} of {in_gib(sizing.usable_bytes)} that may be planned "
        f"({in_gib(machines.node_bytes)} of memory)"
    )
    if sizing.problem is not None:
        return [*lines, f"does not fit: {sizing.problem}"]
    if sizing.resident_share >= 1:
        lines.append("fits: every expert is in memory")
    else:
        lines.append(
            f"fits: {100 * sizing.resident_share:.0f}% of the experts are in memory, the rest is read from disk when "
            f"needed; for all of them {in_gib(sizing.needed_bytes)} would have to be planned on a node"
        )
    return [*lines, *(f"set {key}: {value}" for key, value in sizing.settings)]
