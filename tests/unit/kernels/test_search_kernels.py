"""The compiled kernels of the search compute what numpy computes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.gates.reader import GateReader
from actors.kernels import search
from actors.kernels.search import Lesson, SearchKernels, StepStructure, load_search
from cluster.policies.next_use.estimate import NextUse
from cluster.policies.next_use.settings import NextUseSettings
from cluster.policies.signals import GateSignal, Grid, StepSignal

GRID = Grid(layers=(0, 1, 2, 3, 4), num_experts=7, top_k=2)
DIM = 6


@pytest.fixture
def kernels() -> SearchKernels:
    loaded = load_search()
    if loaded is None:
        pytest.skip("the native library was not built")
    return loaded


def random_steps(num_sequences: int, *, seed: int, grid: Grid = GRID) -> Iterator[tuple[StepSignal, list[GateSignal]]]:
    """Decode steps, after one of prompts of several tokens."""
    rng = np.random.default_rng(seed)
    for number in range(30):
        num_rows = rng.integers(1, 9, num_sequences) if number == 0 else np.ones(num_sequences, np.int64)
        step = StepSignal(
            tuple(range(num_sequences)),
            rng.standard_normal((num_sequences, DIM)).astype(np.float32),
            num_rows,
            np.full(num_sequences, number > 0),
        )
        gates: list[GateSignal] = []
        for row in range(grid.num_layers):
            probs, ahead = rng.dirichlet(np.full(7, 0.3), (2, num_sequences)).astype(np.float32)
            counts = np.zeros((num_sequences, 7), np.float32)
            np.put_along_axis(counts, probs.argsort(axis=1)[:, -2:], 1, axis=1)
            gates.append(GateSignal(row, probs, counts, ahead if row + 1 < grid.num_layers else None))
        yield step, gates


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("weights_per_step", [2_000_000, 2_000])
def test_next_use_is_the_same(kernels: SearchKernels, num_sequences: int, stride: int, weights_per_step: int) -> None:
    settings = replace(NextUseSettings(), weights_per_step=weights_per_step)
    learned = _learn_the_same(kernels, GRID, settings, num_sequences, stride)
    assert np.abs(learned["trajectory.matrices"]).max() > 1e-3, "something was learned"


def test_next_use_is_the_same_where_no_layer_follows(kernels: SearchKernels) -> None:
    learned = _learn_the_same(kernels, replace(GRID, layers=(3,)), NextUseSettings(), num_sequences=3, stride=1)
    assert learned["trajectory.matrices"].size == 0
    assert np.abs(learned["worth.of_own"]).max() > 1e-3, "something was learned"


def _learn_the_same(
    kernels: SearchKernels, grid: Grid, settings: NextUseSettings, num_sequences: int, stride: int
) -> dict[str, np.ndarray]:
    """What compiled code learned of random steps, after it said and learned the same as numpy."""
    compiled = NextUse(grid, embedding_dim=DIM, settings=settings, kernels=kernels)
    plain = NextUse(grid, embedding_dim=DIM, settings=settings)
    said: dict[NextUse, list[np.ndarray]] = {compiled: [], plain: []}
    for step, gates in random_steps(num_sequences, seed=num_sequences, grid=grid):
        for next_use, values in said.items():
            next_use.on_step(step)
            values.append(next_use.hazards().copy())
            for gate in gates:
                next_use.on_gate(gate)
                if (gate.row + 1) % stride == 0:
                    values.extend((next_use.hazards().copy(), next_use.values().copy()))
            next_use.on_step_end()
    for ours, numpys in zip(said[compiled], said[plain], strict=True):
        np.testing.assert_allclose(ours, numpys, rtol=2e-3, atol=1e-5)
    learned = compiled.to_arrays()
    for name, array in plain.to_arrays().items():
        np.testing.assert_allclose(learned[name], array, rtol=1e-2, atol=1e-4, err_msg=name)
    return learned


@pytest.mark.parametrize("structure", [StepStructure, Lesson])
def test_structures_have_the_fields_of_the_header_in_its_order(structure: type[ctypes.Structure]) -> None:
    header = (Path(search.__file__).parent / "search.h").read_text()
    name = {StepStructure: "StepUnderWay"}.get(structure, structure.__name__)
    (body,) = re.findall(rf"typedef struct {{([^}}]*)}} {name};", header)
    fields = re.findall(r"(\w+)(?=[,;])", re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL))

    ours = [re.sub(r"_[A-Z0-9]+$", "", field[0]) for field in structure._fields_]
    assert ours == fields


class _Gate(nn.Module):
    """As transformers' routers: logits, weights, indices of the top 2."""

    def __init__(self, dim: int, num_experts: int, *, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, dim, generator=torch.Generator().manual_seed(3)).to(dtype))
        self.bias = nn.Parameter(torch.randn(num_experts).to(dtype)) if has_bias else None

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden_TD, self.weight, self.bias)
        values, indices = logits.topk(2, dim=-1)
        return logits, values, indices


def test_gates_that_the_kernels_cannot_read_are_read_with_numpy(kernels: SearchKernels) -> None:
    gate = _Gate(16, 7, has_bias=False, dtype=torch.float64)
    hidden = torch.randn((3, 16), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        logits, _, chosen = gate(hidden)
    reader = GateReader(0, gate, None, kernels)
    for ids in (chosen, chosen.int()):
        said = reader.signal(logits, ids, hidden, np.arange(3), 3)
        np.testing.assert_allclose(said.probs, logits.softmax(dim=1).numpy(), rtol=1e-5)
        assert said.counts.sum() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("starts", [[0], [0, 1, 2, 3], [0, 3]])
@pytest.mark.parametrize("has_next", [True, False])
def test_gates_are_read_the_same(kernels: SearchKernels, dtype: torch.dtype, starts: list[int], has_next: bool) -> None:
    num_rows, generator = 4, torch.Generator().manual_seed(1)
    gate, following = (_Gate(16, 7, has_bias=has_bias, dtype=dtype) for has_bias in (False, True))
    hidden = torch.randn((6, 16), generator=generator).to(dtype)  # the last two rows are padding
    with torch.inference_mode():
        logits, _, chosen = gate(hidden)
    said: list[GateSignal] = []
    for use in (kernels, None):
        reader = GateReader(2, gate, GateReader(3, following, None, use) if has_next else None, use)
        said.append(reader.signal(logits, chosen, hidden, np.array(starts), num_rows))
    ours, numpys = said
    assert ours.row == numpys.row == 2
    np.testing.assert_allclose(ours.probs, numpys.probs, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(ours.counts, numpys.counts)
    assert ours.counts.sum() == 2 * num_rows
    if has_next:
        assert ours.ahead is not None and numpys.ahead is not None
        np.testing.assert_allclose(ours.ahead, numpys.ahead, rtol=1e-3, atol=1e-5)
    else:
        assert ours.ahead is None and numpys.ahead is None
