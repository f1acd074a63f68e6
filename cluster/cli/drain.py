"""`moesaic drain`: empty a node of a running server, or use it again. Talks HTTP."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

import typer

from cluster.cli import flags


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="Address, host name, or how the node's id begins.")],
    undo: Annotated[bool, typer.Option("--undo", help="Use the node again.")] = False,
    url: Annotated[str, typer.Option(help="Server to ask.")] = "http://127.0.0.1:8000",
    api_key: flags.ApiKey = None,
    as_json: flags.AsJson = False,
) -> None:
    """Empty NODE: its workers take no new requests, its expert hosts' experts move away."""
    from cluster.cli.server_client import post_json

    line = post_json(url, "/drain", {"node": node, "undo": undo}, api_key=api_key)
    typer.echo(json.dumps(line) if as_json else drain_text(line, undo=undo))


def drain_text(line: dict[str, Any], *, undo: bool) -> str:
    """The answer for people."""
    node, left = str(line["node_id"])[:12], cast("list[str]", line["left"])
    if undo:
        return f"node {node} is used again"
    if line["is_empty"]:
        return f"node {node} is empty and takes nothing new; it can be stopped"
    return "\n".join([f"node {node} takes nothing new; still there:", *(f"  {item}" for item in left)])
