"""`plan --trace` and `diagnose --trace`: what is counted, and that both answer on a trace with a planted skew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from trace_builders import clustered_trace, trace_of
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.trace_loads import count_trace
from cluster.types import Phase


def test_halves_and_phases_are_counted_apart() -> None:
    """Two requests of one layer: a prefill row, then a decode row each."""
    trace = trace_of([[[[0, 1]], [[1, 2]]], [[[3, 1]], [[3, 2]]]], num_experts=4, num_prefill=1)

    counts = count_trace(trace)

    assert counts.first[Phase.PREFILL].tolist() == [[1, 1, 0, 0]]
    assert counts.first[Phase.DECODE].tolist() == [[0, 1, 1, 0]]
    assert counts.second[Phase.PREFILL].tolist() == [[0, 1, 0, 1]]
    assert counts.second[Phase.DECODE].tolist() == [[0, 0, 1, 1]]
    assert counts.domains.shape == (1, 1, 4)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.npz"
    clustered_trace(num_requests=40, num_rows=60, layers=3, experts=16, top_k=2, clusters=2, seed=0).save(path)
    return path


def test_plan_of_a_trace_levels_what_it_did_not_see(trace: Path) -> None:
    found = CliRunner().invoke(app, ["plan", "--trace", str(trace), "--hosts", "4", "--json"])
    shown = CliRunner().invoke(app, ["plan", "--trace", str(trace), "--hosts", "4", "--limit", "1"])

    assert found.exit_code == 0 and shown.exit_code == 0
    plan = json.loads(found.stdout)
    assert plan["applies"] and plan["balance_scored"]["then"] < plan["balance_scored"]["now"] - 0.05
    assert all(move["reason"] and move["bytes"] >= 0 for move in plan["moves"])
    owned = {(int(layer), e) for layers in plan["hosts"].values() for layer, experts in layers.items() for e in experts}
    assert owned == {(layer, expert) for layer in range(3) for expert in range(16)}
    assert "would apply" in shown.stdout and f"and {len(plan['moves']) - 1} more" in shown.stdout


def test_diagnosis_of_a_trace_advises(trace: Path) -> None:
    found = CliRunner().invoke(app, ["diagnose", "--trace", str(trace), "--hosts", "4", "--json"])
    shown = CliRunner().invoke(app, ["diagnose", "--trace", str(trace), "--hosts", "4"])

    assert found.exit_code == 0 and shown.exit_code == 0
    diagnosis = json.loads(found.stdout)
    assert diagnosis["scored"] and np.isfinite(diagnosis["phases"][0]["balance_now"])
    assert any(line.startswith("placement for decode: on") for line in diagnosis["advice"])
    assert all(line in shown.stdout for line in diagnosis["advice"])


def test_a_wrong_share_is_named(trace: Path) -> None:
    found = CliRunner().invoke(app, ["plan", "--trace", str(trace), "--spare", "much"])

    assert found.exit_code == 2 and "--spare" in found.stderr
