"""`moesaic plan`: what placement would move, and why; nothing is moved. Of a running server, or of a recorded trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import flags
from cluster.errors import InvalidRequest


def plan(
    trace: flags.PlanTrace = None,
    hosts: flags.PlanHosts = 3,
    tokens_per_s: flags.PlanTokens = 100.0,
    rows: flags.PlanRows = 8.0,
    prefill_rows: flags.PlanPrefillRows = 256.0,
    expert_ms: flags.PlanExpertMs = 0.1,
    row_ms: flags.PlanRowMs = 0.01,
    link: flags.PlanLink = 1.0,
    spare: flags.PlanSpare = "12.5%",
    horizon_s: Annotated[float, typer.Option(min=1, help="With --trace: seconds that a placement is to last.")] = 600.0,
    max_moved: Annotated[
        str | None, typer.Option(help="With --trace: bytes that may move (1GiB); default: all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Moves shown.")] = 20,
    url: Annotated[str, typer.Option(help="Server to ask.")] = "http://127.0.0.1:8000",
    api_key: flags.ApiKey = None,
    operator_key: flags.OperatorKey = None,
    as_json: flags.AsJson = False,
) -> None:
    """Every move with its reason, bytes and expected gain: a dry run."""
    if trace is None:
        from cluster.cli.server_client import fetch_json

        found: Mapping[str, Any] = fetch_json(url, "/plan", api_key=operator_key or api_key)
    else:
        rates = flags.trace_rates(
            tokens_per_s=tokens_per_s,
            rows=rows,
            prefill_rows=prefill_rows,
            expert_ms=expert_ms,
            row_ms=row_ms,
            link=link,
            spare=spare,
            horizon_s=horizon_s,
            max_moved=max_moved,
        )
        found = plan_of_trace(trace, hosts, rates)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_plan(found, limit)


def plan_of_trace(path: Path, num_hosts: int, rates: Any) -> dict[str, Any]:
    """Planned by the earlier half of the requests; `balance_scored` is what it comes to on the later half."""
    from cluster.cli.trace_loads import count_trace, scored_balance, trace_inputs
    from cluster.placement import plan_placement
    from cluster.placement.explain import plan_as_dict
    from cluster.policies.trace import load_trace

    if num_hosts < 1:
        raise InvalidRequest(f"--hosts {num_hosts}: at least 1")
    recorded = load_trace(path)
    counts = count_trace(recorded)
    inputs = trace_inputs(recorded, counts, num_hosts, rates)
    made = plan_placement(inputs)
    scored = {
        name: scored_balance(inputs, counts, p) for name, p in (("now", inputs.current), ("then", made.placement))
    }
    return {**plan_as_dict(made), "balance_scored": scored}


def print_plan(found: Mapping[str, Any], limit: int) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    from cluster.placement.explain import COLUMNS, plan_headline, plan_rows

    for line in plan_headline(found):
        typer.echo(line)
    scored = found.get("balance_scored")
    if scored is not None:
        typer.echo(
            f"on the later half of the trace, not planned by: {scored['now']:.3f} now, {scored['then']:.3f} then"
        )
    rows = plan_rows(found)
    if not rows:
        return
    table = Table(*COLUMNS)
    for row in rows[:limit]:
        table.add_row(*row)
    Console(width=160).print(table)
    if len(rows) > limit:
        typer.echo(f"and {len(rows) - limit} more (--limit, or --json for all)")
