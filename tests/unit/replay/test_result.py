"""What a table of replays says: machines on which policies cannot differ, and a picture that starts at 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trace_builders import clustered_trace
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.replay.result import compute_bound
from cluster.replay.sweep import Sweep, replay_cells

TRACE = clustered_trace(num_requests=3, num_rows=6, seed=1)
POLICIES = ("lru", "lfu", "belady")


def test_a_link_without_limit_is_compute_bound_and_a_slow_one_is_not() -> None:
    cells = list(replay_cells(TRACE, None, Sweep(policies=POLICIES, caches=(0.25,), links=(0.001, 1e6))))

    (found,) = compute_bound(cells)

    assert found.link_gb_per_s == 1e6 and found.largest_stall <= 0.02
    tpot = [cell.tpot_ms_mean for cell in cells if cell.link_gb_per_s == 1e6]
    assert max(tpot) / min(tpot) < 1.03
    assert "compute-bound at cache 25%" in str(found)


def test_json_is_one_document_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    TRACE.save(path)
    flags = ["--cache", "25%", "--link", "0.001,1000000", "--policies", "lru,belady"]

    document = json.loads(CliRunner().invoke(app, ["replay", str(path), *flags, "--json"]).stdout)
    printed = CliRunner().invoke(app, ["replay", str(path), *flags]).stdout

    assert set(document) == {"trace", "cells", "compute_bound"} and len(document["cells"]) == 4
    assert [machine["link_gb_per_s"] for machine in document["compute_bound"]] == [1e6]
    assert printed.count("compute-bound at") == 1


def test_the_picture_has_a_panel_of_bytes_and_every_axis_starts_at_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    from cluster.replay.plot import draw

    drawn: list[object] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    cells = list(replay_cells(TRACE, None, Sweep(policies=POLICIES, caches=(0.25, 0.5), links=(0.001, 1e6))))
    draw(cells, tmp_path / "p.png")

    (picture,) = drawn
    axes = picture.axes  # type: ignore[attr-defined]
    assert [side.get_ylim()[0] for side in axes] == [0, 0, 0]
    assert "MiB" in axes[2].get_ylabel()
