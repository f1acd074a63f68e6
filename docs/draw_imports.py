"""Draw which rooms import which: `python docs/draw_imports.py docs/images/imports.png`. Needs the `dev` extra.

Rows are the layers of `pyproject.toml`, top down. An arrow is an import. One that follows from others is left out.
One that runs up, or sideways within a layer, is red.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Set
from pathlib import Path

import grimp

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"

Imports = Mapping[str, Set[str]]


def layers() -> list[list[str]]:
    """Rooms by layer, as import-linter is told them."""
    contracts = tomllib.loads(_PROJECT.read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [one for one in contracts if one["type"] == "layers"]
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


def room_imports(rooms: Set[str]) -> dict[str, set[str]]:
    """The rooms that each room imports anything of."""
    graph = grimp.build_graph("cluster", "actors")
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for room in rooms:
        for module in {room, *graph.find_descendants(room)}:
            for imported in graph.find_modules_directly_imported_by(module):
                other = ".".join(imported.split(".")[:2])
                if other in rooms and other != room:
                    found[room].add(other)
    return found


def running_up(order: list[list[str]], imports: Imports) -> list[tuple[str, str]]:
    """Imports that do not run down: to a higher layer, or to a room of the same one."""
    row = {room: index for index, layer in enumerate(order) for room in layer}
    return sorted((room, other) for room, others in imports.items() for other in others if row[other] <= row[room])


def needed(imports: Imports) -> dict[str, set[str]]:
    """Imports without those that follow from others: a to c where a imports b and b reaches c."""
    reached: dict[str, set[str]] = {}

    def reach(room: str, above: tuple[str, ...] = ()) -> set[str]:
        if room not in reached and room not in above:
            reached[room] = {one for other in imports[room] for one in {other, *reach(other, (*above, room))}}
        return reached.get(room, set())

    return {
        room: {one for one in others if not any(one in reach(other) for other in others - {one})}
        for room, others in ((room, set(others)) for room, others in imports.items())
    }


def draw(output: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    order = layers()
    imports = room_imports({room for layer in order for room in layer})
    wrong = set(running_up(order, imports))
    kept = needed(imports)
    widest = max(map(len, order))
    place = {
        room: ((column + 0.5) * widest / len(layer), -row)
        for row, layer in enumerate(order)
        for column, room in enumerate(layer)
    }
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(order)), layout="constrained")
    for room, (x, y) in place.items():
        colour = "#f2d9c4" if room.startswith("actors") else "#cfe0ee"
        box = {"boxstyle": "round,pad=0.25", "facecolor": colour, "edgecolor": "none"}
        axes.text(x, y, room, ha="center", va="center", fontsize=7, bbox=box, zorder=2)
        for other in sorted(kept[room] | {target for source, target in wrong if source == room}):
            is_wrong = (room, other) in wrong
            bend = 0.25 if abs(place[other][1] - y) > 1 else 0.0
            arrow = {
                "arrowstyle": "->",
                "color": "red" if is_wrong else "#888888",
                "lw": 1.2 if is_wrong else 0.6,
                "shrinkA": 7,
                "shrinkB": 7,
                "connectionstyle": f"arc3,rad={bend}",
            }
            axes.annotate("", xy=place[other], xytext=(x, y), arrowprops=arrow, zorder=1)
    axes.set_xlim(0, widest)
    axes.set_ylim(-len(order) + 0.4, 0.6)
    axes.axis("off")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    draw(parser.parse_args().output)
