"""The picture of imports shows every room, and no arrow in it runs up or in a circle."""

from __future__ import annotations

from pathlib import Path

from papers import ROOT, script


def test_every_room_is_in_a_layer() -> None:
    layered = {room for layer in script("draw_imports").layers() for room in layer}
    found = {f"{package}.{path.stem}" for package in ("cluster", "actors") for path in _rooms(ROOT / package)}
    assert found == layered


def test_no_import_runs_up_or_sideways() -> None:
    module = script("draw_imports")
    order = module.layers()
    imports = module.room_imports({room for layer in order for room in layer})
    assert imports["cluster.app"], "the graph knows nothing"
    assert module.running_up(order, imports) == []


def test_an_import_that_runs_up_is_found() -> None:
    order = [["cluster.cli"], ["cluster.stats", "cluster.replay"]]
    imports = {"cluster.cli": {"cluster.stats"}, "cluster.stats": {"cluster.cli"}, "cluster.replay": {"cluster.stats"}}
    found = script("draw_imports").running_up(order, imports)
    assert found == [("cluster.replay", "cluster.stats"), ("cluster.stats", "cluster.cli")]


def test_an_import_that_follows_from_others_is_left_out() -> None:
    imports = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert script("draw_imports").needed(imports) == {"a": {"b"}, "b": {"c"}, "c": set()}


def _rooms(package: Path) -> list[Path]:
    inside = [path for path in package.iterdir() if (path / "__init__.py").is_file() or path.suffix == ".py"]
    return [path for path in inside if path.stem != "__init__"]
