"""The recorder's two ways of counting equal the definition, phase by phase."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from actors.experts.recorder import ActivationRecorder
from actors.kernels.native import NativeKernels, load_native
from cluster.types import Phase


@pytest.fixture(scope="module", params=["native", "numpy"])
def native(request: pytest.FixtureRequest) -> NativeKernels | None:
    kernels = load_native() if request.param == "native" else None
    if request.param == "native" and kernels is None:
        pytest.skip("the compiled kernels were not built")
    return kernels


@settings(max_examples=30, deadline=None)
@given(data=st.data(), rows=st.integers(0, 40), top_k=st.integers(1, 8), num_experts=st.integers(1, 70))
def test_counts_equal_the_definition(
    native: NativeKernels | None, data: st.DataObject, rows: int, top_k: int, num_experts: int
) -> None:
    recorder = ActivationRecorder((3, 5), num_experts, native)
    expected = {layer: torch.zeros(2, num_experts, dtype=torch.int64) for layer in (3, 5)}
    for layer in (3, 5, 3):
        num_decode = data.draw(st.integers(0, rows))
        ids = torch.randint(0, num_experts, (rows, top_k))

        recorder.record(layer, ids, num_decode)

        for row, choices in enumerate(ids.tolist()):
            for expert in choices:
                expected[layer][list(Phase).index(Phase.DECODE if row < num_decode else Phase.PREFILL)][expert] += 1

    recorder.settle()
    assert {layer: counts.tolist() for layer, counts in recorder.counts.items()} == {
        layer: counts.tolist() for layer, counts in expected.items()
    }


def test_strided_choices_are_counted_as_they_read(native: NativeKernels | None) -> None:
    recorder = ActivationRecorder((0,), 4, native)
    ids = torch.tensor([[0, 9, 1, 9], [2, 9, 2, 9]])[:, ::2]

    recorder.record(0, ids, 1)
    recorder.settle()

    assert recorder.counts[0].tolist() == [[0, 0, 2, 0], [1, 1, 0, 0]]


def test_a_step_is_counted_when_its_last_layer_is_recorded() -> None:
    recorder = ActivationRecorder((0, 1), 4, None)
    ids = torch.tensor([[0, 1]])

    recorder.record(0, ids, 1)
    assert not recorder.counts[0].any(), "in the middle of a step the engine has other things to do"
    recorder.record(1, ids, 1)

    assert [counts.sum() for counts in recorder.counts.values()] == [2, 2]
