"""The scheduler's page for people: a few lines below the tables of `moesaic status`."""

from __future__ import annotations

from typing import Any, cast

from cluster.placement.explain import snapshot_text


def scheduler_lines(page: dict[str, Any] | None) -> list[str]:
    """What it knows, what it moves, what drains. Args: page: as /scheduler gives it; None: no scheduler answers."""
    if page is None:
        return ["scheduler: does not answer; routing and placement stand still"]
    lines = [
        f"scheduler: up {page['uptime_s']:.0f} s, {page['routing']} routing; "
        f"{len(page['workers'])} workers and {len(page['hosts'])} expert hosts report"
    ]
    known = cast("dict[str, Any] | None", page["knowledge"])
    if known is None:
        lines.append("  prompts: nothing learned yet")
    else:
        told = f"{known['mutual_information']:.3f} bits of each layer's choice"
        lines.append(
            f"  prompts: {known['num_clusters']} kinds, which tell {told}; version {known['version']}, "
            f"{known['age_s']:.0f} s old, from {known['support']:.0f} tokens"
        )
    lines += _placement_lines(page)
    for drain in cast("list[dict[str, Any]]", page["drains"]):
        left = "empty" if drain["is_empty"] else ", ".join(drain["left"])
        lines.append(f"  draining {drain['node_id'][:12]}: {left}")
    if page.get("snapshot") is not None:
        lines.append(f"  {snapshot_text(page['snapshot'])}")
    return lines


def _placement_lines(page: dict[str, Any]) -> list[str]:
    placement = cast("dict[str, Any]", page["placement"])
    if not page["hosts"]:
        return []
    if not placement["epoch"]:
        return [f"  placement ({page['placement_mode']}): as hosts started"]
    balance = "" if placement["balance"] is None else f", largest over mean load {placement['balance']:.2f}"
    lines = [
        f"  placement ({page['placement_mode']}): epoch {placement['epoch']}{balance}; {placement['num_migrations']} "
        f"migrations of {placement['num_plans']} plans, {placement['bytes_moved'] / 2**20:.1f} MiB moved"
    ]
    if placement["reason"]:
        age_s = placement.get("plan_age_s")
        lines.append(f"  last plan: {placement['reason']}" + ("" if age_s is None else f" ({age_s:.0f} s ago)"))
    if placement["migration"]:
        lines.append(f"  migration: {placement['migration']}")
    return lines
