"""Reads what the gates of a model compute in a forward, while attached; costs nothing when it is not.

Knows transformers' gate modules: they stand beside the experts module and return (logits, weights, indices).

Shapes: T packed rows, D model dim, L MoE layers, E experts of a layer, K experts per token (top-k).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from actors.model.seams import experts_modules, layer_of
from cluster.errors import CheckpointError

_GATE_NAMES = ("gate", "router")


@dataclass(frozen=True, slots=True)
class GateRows:
    """One forward: probs [T, L, E] and ahead [T, L - 1, E] float16, chosen [T, L, K] uint16; see GateTrace."""

    probs: np.ndarray
    chosen: np.ndarray
    ahead: np.ndarray


class GateTap:
    """Hooks on every gate of a model; a context manager."""

    def __init__(self, model: nn.Module) -> None:
        """Raises: CheckpointError: an experts module without a gate beside it."""
        self._gates = gate_modules(model)
        self.layers = tuple(self._gates)
        self._probability = gate_probability(next(iter(self._gates.values())))
        self._handles: list[Any] = []
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._ahead: dict[int, Tensor] = {}

    def __enter__(self) -> Self:
        following = dict(zip(self.layers, self.layers[1:], strict=False))
        for layer, gate in self._gates.items():
            next_gate = self._gates.get(following.get(layer, -1))
            self._handles.append(gate.register_forward_hook(partial(self._on_gate, layer, next_gate)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def take(self, num_rows: int) -> GateRows:
        """What the last forward gave for its first `num_rows` rows; the others are padding."""
        assert len(self._seen) == len(self.layers), "take() follows a whole forward"
        probs = torch.stack([self._seen[layer][0][:num_rows] for layer in self.layers], dim=1)
        chosen = torch.stack([self._seen[layer][1][:num_rows] for layer in self.layers], dim=1)
        ahead = [self._ahead[layer][:num_rows] for layer in self.layers[:-1]]
        stacked = torch.stack(ahead, dim=1) if ahead else probs[:, :0]
        self._seen.clear()
        return GateRows(_half(probs), chosen.cpu().numpy().astype(np.uint16), _half(stacked))

    def _on_gate(
        self, layer: int, next_gate: nn.Module | None, _: nn.Module, inputs: tuple[Tensor, ...], output: Any
    ) -> None:
        logits, _weights, indices = output
        self._seen[layer] = (self._probability(logits), indices)
        if next_gate is not None and not _takes_rows_alone(next_gate):
            self._ahead[layer] = torch.zeros_like(self._seen[layer][0])
        elif next_gate is not None:  # forward, not the call: a call would run this hook for the next layer
            self._ahead[layer] = self._probability(next_gate.forward(inputs[0])[0])


def gate_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The gate of every MoE layer, by decoder layer, in order.

    Raises:
        CheckpointError: an experts module without one beside it.
    """
    modules = dict(model.named_modules())
    gates: dict[int, nn.Module] = {}
    for name in experts_modules(model):
        block = modules[name.rpartition(".")[0]]
        gate = next((getattr(block, n) for n in _GATE_NAMES if isinstance(getattr(block, n, None), nn.Module)), None)
        if gate is None:
            raise CheckpointError(f"module {name}: no gate beside it; its choices cannot be read")
        gates[layer_of(name)] = gate
    return gates


class GateReader:
    """Probabilities of one gate in numpy: for one row torch's set-up of a call costs more than its product.

    A gate that is more than a matrix (with its bias) is asked itself. is_readable: it needs nothing but rows.
    """

    def __init__(self, gate: nn.Module) -> None:
        self._gate = gate
        self.is_readable = _takes_rows_alone(gate)
        self._is_sigmoid = _is_sigmoid(gate)
        self._matrix: np.ndarray | None = None
        self._bias: np.ndarray | None = None
        weight = getattr(gate, "weight", None)
        if self.is_readable and isinstance(weight, Tensor) and weight.dim() == 2:
            self._take_matrix(weight, getattr(gate, "bias", None))

    def read(self, hidden_TD: np.ndarray) -> np.ndarray:
        """[T, E] float32 that the gate would give to float32 rows."""
        return self.probabilities(self._logits(hidden_TD))

    def probabilities(self, logits_TE: np.ndarray) -> np.ndarray:
        """[T, E] from float32 logits: softmax, or sigmoid scores over their sum."""
        if self._is_sigmoid:
            scores = 0.5 + 0.5 * np.tanh(0.5 * logits_TE)
        else:
            scores = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)

    def _logits(self, hidden_TD: np.ndarray) -> np.ndarray:
        if self._matrix is None:
            rows = torch.from_numpy(hidden_TD).to(next(self._gate.parameters()).dtype)
            with torch.inference_mode():  # forward, not the call: a call would run hooks
                return self._gate.forward(rows)[0].float().numpy()
        logits_TE = hidden_TD @ self._matrix
        return logits_TE if self._bias is None else logits_TE + self._bias

    def _take_matrix(self, weight: Tensor, bias: object) -> None:
        """Use the matrix if the gate's logits are its product with the rows and no more."""
        probe = torch.randn((4, weight.shape[1]), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        with torch.inference_mode():
            wanted = self._gate.forward(probe)[0].float().numpy()
        self._matrix = np.ascontiguousarray(weight.detach().float().numpy().T)
        self._bias = bias.detach().float().numpy() if isinstance(bias, Tensor) else None
        if not np.allclose(self._logits(probe.float().numpy()), wanted, rtol=0.05, atol=0.05):
            self._matrix = None


def _takes_rows_alone(gate: nn.Module) -> bool:
    parameters = list(inspect.signature(type(gate).forward).parameters.values())[2:]  # after self and the rows
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in parameters)


def _is_sigmoid(gate: nn.Module) -> bool:
    return "sigmoid" in type(gate).forward.__code__.co_names


def gate_probability(gate: nn.Module) -> Callable[[Tensor], Tensor]:
    """From logits [T, E] to probabilities [T, E] float32: softmax, or sigmoid scores over their sum."""
    if _is_sigmoid(gate):
        return _normalised_sigmoid
    return partial(torch.softmax, dim=-1, dtype=torch.float32)


def _normalised_sigmoid(logits: Tensor) -> Tensor:
    scores = logits.float().sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True)


def _half(values: Tensor) -> np.ndarray:
    return values.to(torch.float16).cpu().numpy()
