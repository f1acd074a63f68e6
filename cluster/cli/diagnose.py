"""`moesaic diagnose`: would placement, replicas and semantic routing pay? Of a running server, or of a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli import flags

if TYPE_CHECKING:
    from cluster.cli.trace_loads import Rates


def diagnose(
    trace: flags.PlanTrace = None,
    hosts: flags.PlanHosts = 3,
    workers: Annotated[int, typer.Option(min=1, help="With --trace: attention workers.")] = 4,
    tokens_per_s: flags.PlanTokens = 100.0,
    rows: flags.PlanRows = 8.0,
    prefill_rows: flags.PlanPrefillRows = 256.0,
    expert_ms: flags.PlanExpertMs = 0.1,
    row_ms: flags.PlanRowMs = 0.01,
    url: Annotated[str, typer.Option(help="Server to ask.")] = "http://127.0.0.1:8000",
    api_key: flags.ApiKey = None,
    operator_key: flags.OperatorKey = None,
    as_json: flags.AsJson = False,
) -> None:
    """Skew, persistence, predicted gains and advice; "leave it off" is an answer."""
    if trace is None:
        from cluster.cli.server_client import fetch_json

        found: Mapping[str, Any] = fetch_json(url, "/diagnose", api_key=operator_key or api_key)
    else:
        rates = flags.trace_rates(
            tokens_per_s=tokens_per_s, rows=rows, prefill_rows=prefill_rows, expert_ms=expert_ms, row_ms=row_ms
        )
        found = diagnosis_of_trace(trace, hosts, workers, rates)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        print_diagnosis(found)


def diagnosis_of_trace(path: Path, num_hosts: int, num_workers: int, rates: Rates) -> dict[str, Any]:
    """Learned from the earlier half of the requests of every domain, scored on the later half."""
    from cluster.cli.trace_loads import count_trace, trace_inputs
    from cluster.control.diagnose import DiagnosisInputs, diagnose
    from cluster.policies.trace import load_trace
    from cluster.semantics.expectation import mutual_information

    recorded = load_trace(path)
    counts = count_trace(recorded)
    found = diagnose(
        DiagnosisInputs(
            placement=trace_inputs(recorded, counts, num_hosts, rates),
            counts=counts.first,
            later=counts.second,
            kinds=counts.domains,
            kinds_later=counts.domains_later,
            mutual_information=mutual_information(counts.domains),
            num_workers=num_workers,
        )
    )
    return found.as_dict()


def print_diagnosis(found: Mapping[str, Any]) -> None:
    """For people."""
    from rich.console import Console
    from rich.table import Table

    from cluster.placement.explain import snapshot_text

    if found["phases"]:
        table = Table("", *(str(phase["phase"]) for phase in found["phases"]))
        for name, tell in {**_ROWS, **(_HOST_ROWS if found["num_hosts"] else {})}.items():
            table.add_row(name, *(tell(phase) for phase in found["phases"]))
        shares = sorted({share for phase in found["phases"] for share in phase["balance_then"]}, key=float)
        for share in shares if found["num_hosts"] else ():
            name = f"hosts, planned, {float(share):.1%} more room"
            table.add_row(name, *(f"{phase['balance_then'][share]:.3f}" for phase in found["phases"]))
        Console(width=120).print(table)
    else:
        typer.echo("no expert was used yet: send some requests")
    if found["balance_now"] is not None:
        typer.echo(f"largest over mean host load, all phases: {found['balance_now']:.3f}")
    semantic = found["semantic"]
    if semantic is not None:
        bits = semantic["mutual_information"]
        told = "" if bits is None else f", {bits:.3f} bits of each layer's choice"
        misses = ", ".join(f"{ratio:.2f}x at {float(cache):.0%} cache" for cache, ratio in semantic["misses"].items())
        typer.echo(f"{semantic['num_kinds']} kinds of prompt{told}; misses of {semantic['num_workers']} workers")
        typer.echo(f"that specialise, over those of workers that take all: {misses}")
    typer.echo("scored on what was not learned from" if found["scored"] else "of the period that was learned from")
    if found.get("snapshot") is not None:
        typer.echo(snapshot_text(found["snapshot"]))
    for line in found["advice"]:
        typer.echo(f"- {line}")


_ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "activations": lambda phase: f"{phase['activations']:,.0f}",
    "bound by": lambda phase: str(phase["regime"]),
    "experts, max over mean": lambda phase: f"{phase['max_over_mean']:.2f} (worst {phase['max_over_mean_worst']:.2f})",
    "experts, Gini": lambda phase: f"{phase['gini']:.2f}",
    "spread that is not chance": lambda phase: f"{phase['reliability']:.0%}",
    "spread that lasts": lambda phase: "-" if phase["persistence"] is None else f"{phase['persistence']:.0%}",
}
_HOST_ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "hosts now, max over mean": lambda phase: f"{phase['balance_now']:.3f}",
}
