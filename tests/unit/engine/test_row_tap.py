"""What is read of the gates, on small modules of the shape that transformers gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.engine.trace_recorder import RowTap
from actors.gates.reader import gate_probability, gate_readers
from actors.kernels.search import SearchKernels, load_search
from cluster.errors import CheckpointError

DIM, EXPERTS, TOP_K = 6, 5, 2


class _Experts(nn.Module):
    is_transposed = False

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gate_up

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden


class SoftmaxGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, DIM) @ self.weight.T
        weights, indices = torch.topk(logits.softmax(-1), TOP_K)
        return logits, weights, indices


class SigmoidGate(SoftmaxGate):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, DIM) @ self.weight.T
        weights, indices = torch.topk(logits.sigmoid(), TOP_K)
        return logits, weights, indices


class _Block(nn.Module):
    def __init__(self, gate: nn.Module | None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = _Experts()


class _Model(nn.Module):
    def __init__(self, *gates: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(gate) for gate in gates)

    def forward(self, hidden: Tensor) -> Tensor:
        for i, block in enumerate(self.layers):
            _, weights, indices = block.gate(hidden + i)  # type: ignore[union-attr, operator]
            block.experts(hidden, indices, weights)  # type: ignore[union-attr, operator]
        return hidden


@pytest.mark.parametrize("kind", [SoftmaxGate, SigmoidGate])
def test_probabilities_choices_and_the_next_gate_are_read_without_padding(kind: type[SoftmaxGate]) -> None:
    torch.manual_seed(0)
    gates = [kind() for _ in range(3)]
    model, hidden = _Model(*gates), torch.randn(4, DIM)

    with torch.no_grad(), RowTap(model) as tap:
        model(hidden)
        rows = tap.take(3)

        probability = gate_probability(gates[0])
        assert rows.probs.shape == (3, 3, EXPERTS) and rows.ahead.shape == (3, 2, EXPERTS)
        np.testing.assert_allclose(rows.probs.sum(axis=2), 1, atol=2e-3)
        for i in range(3):
            logits, _, indices = gates[i](hidden[:3] + i)
            np.testing.assert_allclose(rows.probs[:, i], probability(logits), atol=1e-3)
            np.testing.assert_array_equal(rows.chosen[:, i], indices)
        for i in range(2):
            np.testing.assert_allclose(rows.ahead[:, i], probability(gates[i + 1](hidden[:3] + i)[0]), atol=1e-3)


@pytest.mark.parametrize("kernels", [None, load_search()], ids=["numpy", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [SoftmaxGate, SigmoidGate])
def test_a_trace_has_what_policies_hear(
    kind: type[SoftmaxGate], dtype: torch.dtype, kernels: SearchKernels | None
) -> None:
    torch.manual_seed(0)
    gates = [kind().to(dtype) for _ in range(2)]
    model, hidden = _Model(*gates), torch.randn(4, DIM).to(dtype)

    with torch.no_grad(), RowTap(model) as tap:
        model(hidden)
        rows = tap.take(3)
    reader = gate_readers(model, kernels)[0]
    with torch.no_grad():
        logits, _, indices = gates[0](hidden)
        heard = reader.signal(logits, indices, hidden, np.arange(3), 3)  # each row a sequence of its own

    exactness = 1e-3 if dtype is torch.float32 else 2e-2  # of the model's own type, in which a trace asks the next gate
    np.testing.assert_allclose(rows.probs[:, 0], heard.probs, atol=1e-3)
    np.testing.assert_allclose(rows.ahead[:, 0], heard.ahead, atol=exactness)
    np.testing.assert_array_equal(np.sort(rows.chosen[:, 0]), np.sort(np.nonzero(heard.counts)[1].reshape(3, TOP_K)))


def test_nothing_stays_hooked_afterwards() -> None:
    gates = [SoftmaxGate(), SoftmaxGate()]

    with RowTap(_Model(*gates)):
        assert all(gate._forward_hooks for gate in gates)

    assert not any(gate._forward_hooks for gate in gates)


def test_experts_without_a_gate_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts: no gate"):
        RowTap(_Model(None))
