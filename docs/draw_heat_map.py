"""Draw which experts each domain of a gate trace uses: `python docs/draw_heat_map.py TRACE docs/images/experts.png`.

TRACE comes from `moesaic trace record`, of prompts that name their domain. Needs the `dev` extra (matplotlib).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cluster.policies.trace import GateTrace, load_trace

_MAX_TIMES = 4.0  # where the colours end: times as often as the layer's mean


def shares(trace: GateTrace, layer: int) -> dict[str, np.ndarray]:
    """By domain, how often each expert of the layer was chosen, in times the mean of the domain.

    Args:
        layer: index among the MoE layers.

    Returns:
        [experts] float64 for each domain, by its name.
    """
    counts: dict[str, np.ndarray] = {}
    for request, start, stop in zip(trace.requests, trace.row_starts, trace.row_starts[1:], strict=False):
        chosen = trace.chosen[start:stop, layer].ravel()
        of_request = np.bincount(chosen, minlength=trace.model.num_experts)
        counts[request.domain] = counts.get(request.domain, np.zeros(trace.model.num_experts)) + of_request
    return {domain: count / count.mean() for domain, count in sorted(counts.items())}


def draw(trace: GateTrace, layer: int, output: Path) -> None:
    """Write the picture: one row for each domain, one column for each expert, ordered so that like rows are near."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    by_domain = shares(trace, layer)
    matrix = np.stack(list(by_domain.values()))
    rows = _near_each_other(matrix)
    columns = np.argsort(np.argmax(matrix[rows], axis=0), kind="stable")
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    image = axes.imshow(matrix[rows][:, columns], aspect="auto", cmap="magma", vmin=0, vmax=_MAX_TIMES)
    names = list(by_domain)
    axes.set_yticks(range(len(rows)), [names[row].replace("_", " ") for row in rows], fontsize=8)
    axes.set_xticks([])
    axes.set_xlabel(f"the {matrix.shape[1]} experts of layer {trace.model.layers[layer]}", fontsize=9)
    axes.set_title(f"{trace.model.name}: which experts each kind of text uses", fontsize=10)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("times as often as the mean expert", fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _near_each_other(matrix: np.ndarray) -> list[int]:
    """Rows in an order in which each is followed by the most similar one that is left."""
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    order = [0]
    while len(order) < len(matrix):
        left = [row for row in range(len(matrix)) if row not in order]
        order.append(max(left, key=lambda row: float(unit[order[-1]] @ unit[row])))
    return order


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layer", type=int, default=6, help="index among the MoE layers")
    arguments = parser.parse_args()
    draw(load_trace(arguments.trace), arguments.layer, arguments.output)
