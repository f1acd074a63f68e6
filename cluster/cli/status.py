"""`moesaic status`: what a running server says of itself, as a table or as JSON."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cluster.cli import flags
from cluster.cli.scheduler_lines import scheduler_lines
from cluster.stats.activation_counts import load_balance
from cluster.status.expert_memory import MEMORY_ROWS, TRAFFIC_ROWS, ExpertMemoryStatus
from cluster.status.fields import Unit, rows, shown
from cluster.status.host import HOST_ROWS, ExpertHostStatus
from cluster.status.worker import WORKER_ROWS, WorkerStatus
from cluster.types import Phase, Tier

if TYPE_CHECKING:
    from rich.console import RenderableType

_CELLS = 32
_SHADES = "·░▒▓█"


def status(
    url: Annotated[str, typer.Option(help="Server to ask.")] = "http://127.0.0.1:8000",
    api_key: flags.ApiKey = None,
    operator_key: flags.OperatorKey = None,
    as_json: flags.AsJson = False,
    watch: Annotated[float | None, typer.Option(metavar="SECONDS", min=0.1, help="Ask again this often.")] = None,
) -> None:
    """Show workers, memory and experts of the server at --url."""
    if watch is None:
        state = fetch_state(url, operator_key or api_key)
        if as_json:
            typer.echo(json.dumps(state))
        else:
            from rich.console import Console

            Console().print(render_state(url, state))
        return
    try:
        _watch(url, operator_key or api_key, watch, as_json=as_json)
    except KeyboardInterrupt:  # the way to end it, not a failure
        return


def fetch_state(url: str, api_key: str | None) -> dict[str, Any]:
    """What /status, /ready, /experts and /scheduler say, joined.

    Raises:
        Unavailable: no server there.
    """
    from cluster.cli.server_client import fetch_json

    status_page = fetch_json(url, "/status", api_key=api_key)
    ready_page = fetch_json(url, "/ready", api_key=api_key, accept=(200, 503))
    experts_page = fetch_json(url, "/experts", api_key=api_key, accept=(200, 503))
    scheduler_page = fetch_json(url, "/scheduler", api_key=api_key, accept=(200, 404, 503))
    experts = [*experts_page.get("workers", []), *experts_page.get("hosts", [])]
    return {
        **status_page,
        "ready": ready_page,
        "experts": experts,
        "cluster": experts_page.get("cluster"),
        "scheduler": scheduler_page if "uptime_s" in scheduler_page else None,
    }


def render_state(url: str, state: dict[str, Any]) -> RenderableType:
    """Tables for people."""
    from rich.console import Group
    from rich.text import Text

    workers = cast("list[dict[str, Any]]", state.get("workers", []))
    parts: list[RenderableType] = [Text(f"{url}{' (draining)' if state.get('draining') else ''}", style="bold")]
    columns = {str(worker.get("worker_id")): _worker_rows(worker) for worker in workers}
    parts.append(_process_table(columns) if workers else Text("no workers yet"))
    hosts = cast("list[dict[str, Any]]", state.get("hosts", []))
    if hosts:
        parts.append(_process_table({str(host.get("host_id")): _host_rows(host) for host in hosts}))
    parts += [Text(f"warning: {notice}", style="yellow") for notice in state.get("notices", [])]
    for worker in workers:
        for reason in cast("list[str]", worker.get("degraded") or []):
            parts.append(Text(f"degraded ({worker.get('worker_id')}): {reason}", style="yellow"))
        if worker.get("error"):
            parts.append(Text(f"error ({worker.get('worker_id')}): {worker['error']}", style="red"))
    if "scheduler" in state:
        page = cast("dict[str, Any] | None", state["scheduler"])
        parts += [Text(line) for line in scheduler_lines(page)]
        for reason in cast("list[str]", page["degraded"] if page else []):
            parts.append(Text(f"degraded (scheduler): {reason}", style="yellow"))
    parts += _activation_parts(state)
    for experts in cast("list[dict[str, Any]]", state.get("experts", [])):
        parts.append(Text(f"experts of {experts.get('id')}: resident in each layer, hits", style="bold"))
        parts += [Text(residency_line(layer)) for layer in cast("list[dict[str, Any]]", experts.get("layers", []))]
    return Group(*parts)


def residency_line(layer: dict[str, Any]) -> str:
    """One layer: a bar over the experts (full block: all of a cell's are resident), counts, hit rate."""
    num_experts = cast(int, layer["num_experts"])
    resident = set(cast("list[int]", layer["resident"]))
    num_cells = min(_CELLS, num_experts)
    cells: list[str] = []
    for cell in range(num_cells):
        members = range(cell * num_experts // num_cells, (cell + 1) * num_experts // num_cells)
        share = sum(expert in resident for expert in members) / len(members)
        cells.append(_SHADES[0] if share == 0 else _SHADES[max(1, int(share * (len(_SHADES) - 1)))])
    lookups = layer["hits"] + layer["misses"]
    hit_rate = f"{layer['hits'] / lookups:.0%} of {lookups}" if lookups else "not used"
    return f"layer {layer['layer']:3d} {''.join(cells)} {len(resident):4d}/{num_experts} {hit_rate}"


def activation_rows(layers: list[dict[str, Any]]) -> dict[str, str]:
    """Counts by phase, and the layer where the busiest expert has most, as a multiple of the layer's mean."""
    found: dict[str, str] = {}
    for phase in Phase:
        counts = {layer["layer"]: cast("list[int]", layer["activations"].get(phase, [])) for layer in layers}
        ratios = {layer: ratio for layer, row in counts.items() if (ratio := load_balance(row)) is not None}
        worst = max(ratios, key=ratios.__getitem__, default=None)
        found[f"{phase} activations"] = f"{sum(map(sum, counts.values())):,}"
        found[f"{phase} max / mean"] = "-" if worst is None else f"{ratios[worst]:.2f} (layer {worst})"
    return found


def _activation_parts(state: dict[str, Any]) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    cluster = cast("dict[str, Any] | None", state.get("cluster"))
    if cluster is None:
        return []
    columns = {"cluster": activation_rows(cluster["layers"])}
    for experts in cast("list[dict[str, Any]]", state.get("experts", [])):
        if any(layer["activations"] for layer in experts["layers"]):  # hosts count none
            columns[str(experts.get("id"))] = activation_rows(experts["layers"])
    table = Table("", *columns)
    for name in columns["cluster"]:
        table.add_row(name, *(column[name] for column in columns.values()))
    parts: list[RenderableType] = [table]
    if cluster.get("degraded"):
        parts.append(Text(f"degraded (cluster-wide counts): {cluster['degraded']}", style="yellow"))
    return parts


def _process_table(columns: dict[str, dict[str, str]]) -> RenderableType:
    """One column for each process; what one of them does not say is -."""
    from rich.table import Table

    table = Table("", *columns)
    for name in {name: None for column in columns.values() for name in column}:
        table.add_row(name, *(column.get(name, "-") for column in columns.values()))
    return table


def _host_rows(host: dict[str, Any]) -> dict[str, str]:
    return rows(ExpertHostStatus, HOST_ROWS, host) | memory_rows(host.get("expert_memory"))


def _worker_rows(worker: dict[str, Any]) -> dict[str, str]:
    return rows(WorkerStatus, WORKER_ROWS, worker) | memory_rows(worker.get("expert_memory"))


def memory_rows(memory: dict[str, Any] | None) -> dict[str, str]:
    """An expert memory: its tiers, where experts were found, what was fetched ahead, how forecasts came true."""
    if memory is None:
        return {"expert memory": "-"}
    found = {Tier.DEVICE: memory["hits"], **memory["misses_by_tier"]}
    lookups = memory["hits"] + memory["misses"]
    tiers = cast("list[dict[str, Any]]", memory["tiers"])
    lines = {f"{tier['tier']} tier": _tier_line(tier, found.get(tier["tier"], 0), lookups) for tier in tiers}
    lines |= rows(ExpertMemoryStatus, TRAFFIC_ROWS, memory)
    lines["forecast: came true"] = _calibration_line(memory["calibration"])
    return rows(ExpertMemoryStatus, MEMORY_ROWS, memory) | lines


def _tier_line(tier: dict[str, Any], found: int, lookups: int) -> str:
    facts = [f"{found / lookups:.0%} found here" if lookups else "not used"]
    if tier["budget_bytes"] is not None:
        facts.insert(0, f"{shown(tier['resident_bytes'], Unit.BYTES)} of {shown(tier['budget_bytes'], Unit.BYTES)}")
    if tier["bytes_moved"]:
        facts.append(f"moved {shown(tier['bytes_moved'], Unit.BYTES)}")
    return ", ".join(facts) + (" (emulated link)" if tier["emulated"] else "")


def _calibration_line(bins: list[dict[str, Any]]) -> str:
    """Mean forecast and the share that came true, for every range of probability that had any."""
    pairs = [f"{b['predicted']:.0%}: {b['observed']:.0%}" for b in bins if b["count"]]
    return ", ".join(pairs) if pairs else "no forecasts"


def _watch(url: str, api_key: str | None, interval_s: float, *, as_json: bool) -> None:
    if as_json:
        while True:
            typer.echo(json.dumps(fetch_state(url, api_key)))
            time.sleep(interval_s)
    from rich.live import Live

    with Live(render_state(url, fetch_state(url, api_key)), auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(render_state(url, fetch_state(url, api_key)), refresh=True)
