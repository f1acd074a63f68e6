"""The recorder's two ways of counting equal the definition, by phase and by cluster of prompts."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork
from actors.kernels.native import NativeKernels, load_native
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, MASS

LAYERS = (3, 5)
NUM_CLUSTERS = 2


@pytest.fixture(scope="module", params=["native", "numpy"])
def native(request: pytest.FixtureRequest) -> NativeKernels | None:
    kernels = load_native() if request.param == "native" else None
    if request.param == "native" and kernels is None:
        pytest.skip("the compiled kernels were not built")
    return kernels


def _work(
    layer: int, ids: torch.Tensor, weights: torch.Tensor | None = None, clusters: torch.Tensor | None = None
) -> ExpertWork:
    return ExpertWork(
        layer, torch.empty(len(ids), 1), ids, torch.ones(ids.shape) if weights is None else weights, clusters
    )


def _knowledge(num_experts: int, *, version: int = 1) -> Knowledge:
    """Two clusters: prompts along the first axis, and along the second."""
    uses = np.zeros((NUM_CLUSTERS, len(LAYERS), num_experts), dtype=np.float32)
    return Knowledge(
        version=version,
        clusters_version=version,
        layers=LAYERS,
        centroids=np.eye(2, dtype=np.float32),
        uses=uses,
        prior=uses[0],
        support=np.zeros(NUM_CLUSTERS, dtype=np.float32),
        mutual_information=0.0,
    )


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(0, 40),
    top_k=st.integers(1, 8),
    num_experts=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_counts_equal_the_definition(
    native: NativeKernels | None,
    data: st.DataObject,
    rows: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
) -> None:
    recorder = ActivationRecorder(LAYERS, num_experts, native)
    recorder.set_knowledge(_knowledge(num_experts))
    expected = np.zeros((NUM_CLUSTERS + 1, 2, len(LAYERS), num_experts, 2))
    for _ in range(2):
        num_decode = data.draw(st.integers(0, rows))
        clusters = torch.tensor(
            data.draw(st.lists(st.integers(-1, 1), min_size=rows, max_size=rows)), dtype=torch.int32
        )
        for place, layer in enumerate(LAYERS):
            ids = torch.randint(0, num_experts, (rows + 3, top_k))  # the last three are padding
            weights = torch.rand(rows + 3, top_k).to(dtype)

            recorder.record(_work(layer, ids, weights, clusters), rows, num_decode)

            for row in range(rows):
                for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
                    expected[clusters[row], int(row < num_decode), place, expert] += (1, weight)

    recorder.settle()
    counts = expected[..., COUNT].sum(axis=0)
    assert {layer: of_layer.tolist() for layer, of_layer in recorder.counts.items()} == {
        layer: counts[:, place].tolist() for place, layer in enumerate(LAYERS)
    }
    np.testing.assert_array_equal(recorder.statistics.values[..., COUNT], expected[..., COUNT])
    np.testing.assert_allclose(recorder.statistics.values[..., MASS], expected[..., MASS], rtol=1e-12)


def test_strided_choices_are_counted_as_they_read(native: NativeKernels | None) -> None:
    recorder = ActivationRecorder((0,), 4, native)
    ids = torch.tensor([[0, 9, 1, 9], [2, 9, 2, 9]])[:, ::2]
    weights = torch.tensor([[0.25, 9, 0.5, 9], [1, 9, 1, 9]])[:, ::2]

    recorder.record(_work(0, ids, weights), 2, 1)
    recorder.settle()

    assert recorder.counts[0].tolist() == [[0, 0, 2, 0], [1, 1, 0, 0]]
    assert recorder.statistics.values[-1, 1, 0].tolist() == [[1, 0.25], [1, 0.5], [0, 0], [0, 0]]


def test_small_steps_are_counted_some_together_and_large_ones_at_once() -> None:
    recorder = ActivationRecorder((0, 1), 4, None)
    steps_until_counted: list[int] = []
    for num_rows in (1, 1, 100):
        ids, num_steps, before = torch.zeros(num_rows, 1, dtype=torch.int64), 0, recorder.counts[1].sum()
        while recorder.counts[1].sum() == before:
            for layer in (0, 1):
                recorder.record(_work(layer, ids), num_rows, num_rows)
            num_steps += 1
        steps_until_counted.append(num_steps)
        assert recorder.counts[0].sum() == recorder.counts[1].sum() == before + num_steps * num_rows
    assert steps_until_counted == [8, 8, 1]


def test_micro_batches_of_a_step_keep_their_rows_apart(native: NativeKernels | None) -> None:
    recorder = ActivationRecorder(LAYERS, 4, native)
    recorder.set_knowledge(_knowledge(4))
    first, second = torch.tensor([0, 0], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    for layer in LAYERS:
        recorder.record(_work(layer, torch.tensor([[0], [1]]), clusters=first), 2, 2)
        recorder.record(_work(layer, torch.tensor([[3]]), clusters=second), 1, 0)
    recorder.settle()

    counts = recorder.statistics.values[..., COUNT]
    assert counts[0, 1].tolist() == [[1, 1, 0, 0]] * 2
    assert counts[1, 0].tolist() == [[0, 0, 0, 1]] * 2
    assert counts.sum() == 6


def test_new_clusters_begin_anew_and_totals_go_on() -> None:
    recorder = ActivationRecorder(LAYERS, 4, None)
    one, other = np.array([127, 0], dtype=np.int8).tobytes(), np.array([0, 127], dtype=np.int8).tobytes()
    assert recorder.cluster_of(one) == -1
    recorder.record(_work(3, torch.tensor([[2]])), 1, 1)

    recorder.set_knowledge(_knowledge(4))
    before = recorder.statistics
    recorder.set_knowledge(_knowledge(4))

    assert recorder.statistics is before, "the same clusters"
    assert recorder.counts[3][1].tolist() == [0, 0, 1, 0], "what was pending is counted, as it was"
    assert not before.values.any()
    assert [recorder.cluster_of(embedding) for embedding in (one, other, b"")] == [0, 1, -1]


def test_prompts_to_learn_from_are_a_bounded_sample_and_given_once() -> None:
    recorder = ActivationRecorder(LAYERS, 4, None)
    for number in range(1, 101):
        recorder.take_in(bytes([number, 1]))
    recorder.take_in(b"")

    prompts = recorder.drain_prompts()

    assert len(set(prompts)) == 32 and b"" not in prompts
    assert any(prompt[0] > 50 for prompt in prompts), "late ones as well"
    assert recorder.drain_prompts() == []
