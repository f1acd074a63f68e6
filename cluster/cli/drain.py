"""`moesaic drain`: empty a node of a running server, or use it again. Talks HTTP."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Annotated, Any, cast

import typer

from cluster.cli import flags
from cluster.errors import Unavailable

_NOT_EMPTY = 3  # exit code
_POLL_S = 1.0


def drain(
    node: Annotated[str, typer.Argument(metavar="NODE", help="Address, host name, or how the node's id begins.")],
    undo: Annotated[bool, typer.Option("--undo", help="Use the node again.")] = False,
    wait: Annotated[
        float, typer.Option("--wait", min=0, metavar="SECONDS", help="Wait until the node is empty, at most so long.")
    ] = 0.0,
    url: Annotated[str, typer.Option(help="Server to ask.")] = "http://127.0.0.1:8000",
    api_key: flags.ApiKey = None,
    operator_key: flags.OperatorKey = None,
    as_json: flags.AsJson = False,
) -> None:
    """Empty NODE: its workers take no new requests, its expert hosts' experts move away.

    Exit code 0: the node is empty (with --undo: it is used again); 3: something is still there.
    """
    from cluster.cli.server_client import post_json

    key, end_s = operator_key or api_key, time.monotonic() + wait
    line = post_json(url, "/drain", {"node": node, "undo": undo}, api_key=key)
    while not undo and not line["is_empty"] and time.monotonic() < end_s:
        time.sleep(min(_POLL_S, max(0.0, end_s - time.monotonic())))
        with contextlib.suppress(Unavailable):  # the scheduler is being restarted; what it drains it remembers
            line = post_json(
                url, "/drain", {"node": str(line["node_id"]), "undo": False}, api_key=operator_key or api_key
            )
    typer.echo(json.dumps(line) if as_json else drain_text(line, undo=undo))
    if not undo and not line["is_empty"]:
        raise typer.Exit(_NOT_EMPTY)


def drain_text(line: dict[str, Any], *, undo: bool) -> str:
    """The answer for people."""
    node, left = str(line["node_id"])[:12], cast("list[str]", line["left"])
    if undo:
        return f"node {node} is used again"
    if line["is_empty"]:
        return f"node {node} is empty and takes nothing new; it can be stopped"
    return "\n".join([f"node {node} takes nothing new; still there:", *(f"  {item}" for item in left)])
