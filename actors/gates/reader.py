"""Reads what the gates of a model compute in a forward, for policies and for traces.

Knows transformers' gate modules: they stand beside the experts module and return (logits, weights, indices).

Shapes: T packed rows, D model dim, L MoE layers, E experts of a layer, K experts per token (top-k).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from actors.kernels.native import DTYPE_CODES
from actors.kernels.search import GateForm, SearchKernels
from actors.model.seams import experts_modules, layer_of
from cluster.errors import CheckpointError
from cluster.policies.signals import GateSignal

_GATE_NAMES = ("gate", "router")


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
    """What one gate says: to policies of each sequence (`signal`), to a trace of each row (`rows`).

    `signal` goes without torch: for one row its set-up of a call costs more than the product. A gate that is more than
    a matrix (with its bias) is asked itself, unless it needs more than rows.
    """

    def __init__(self, row: int, gate: nn.Module, following: GateReader | None, kernels: SearchKernels | None) -> None:
        """Args: row: of the layer in the grid. following: the next layer's. kernels: None: in numpy."""
        self._row, self.gate, self._kernels = row, gate, kernels
        self._probability = gate_probability(gate)
        self._is_sigmoid = _is_sigmoid(gate)
        self._takes_rows = _takes_rows_alone(gate)
        self._matrix: np.ndarray | None = None
        self._bias: np.ndarray | None = None
        weight = getattr(gate, "weight", None)
        if self._takes_rows and isinstance(weight, Tensor) and weight.dim() == 2:
            self._take_matrix(weight, getattr(gate, "bias", None))
        self._following = following if following is not None and following._takes_rows else None
        self._form: GateForm | None = None

    def signal(
        self, logits_TE: Tensor, chosen_TK: Tensor, hidden_TD: Tensor, starts: np.ndarray, num_rows: int
    ) -> GateSignal:
        """What this gate said of each sequence, and what the following one says of the same rows.

        Args: starts: [S] int64, where the sequences' rows begin. num_rows: in all; the others are padding.
        """
        following, kernels = self._following, self._kernels
        if kernels is not None and self._form is None:
            self._form = self._form_for(kernels, logits_TE, chosen_TK, hidden_TD)
            if self._form is None:
                self._kernels = None
        if kernels is not None and self._form is not None:
            logits_TE, chosen_TK, hidden_TD = _contiguous(logits_TE), _contiguous(chosen_TK), _contiguous(hidden_TD)
            said = kernels.read_gate(
                self._form,
                (logits_TE.data_ptr(), DTYPE_CODES[logits_TE.dtype]),
                (hidden_TD.data_ptr(), DTYPE_CODES[hidden_TD.dtype]),
                chosen_TK.data_ptr(),
                starts,
                num_rows,
            )
            return GateSignal(self._row, said[0], said[1], None if following is None else said[2])
        logits, hidden = (rows[:num_rows].float().cpu().numpy() for rows in (logits_TE, hidden_TD))
        counts = np.zeros(logits.shape, dtype=np.float32)
        np.put_along_axis(counts, chosen_TK[:num_rows].long().cpu().numpy(), 1.0, axis=1)
        ahead = None if following is None else means(following._probabilities(following._logits(hidden)), starts)
        return GateSignal(self._row, means(self._probabilities(logits), starts), _sums(counts, starts), ahead)

    def rows(self, logits_TE: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What this gate said of each row, and what the following one says of the same rows: [T, E] float32 each.

        In torch and in the model's own floating-point type, so that a trace is the same on every machine that computes
        the model alike: `signal` differs by rounding. Call it within the forward.

        Args: hidden: what the gate was called with.
        """
        following = self._following
        # forward, not the call: a call would run hooks
        ahead = None if following is None else following._probability(following.gate.forward(hidden)[0])
        return self._probability(logits_TE), ahead

    def _form_for(
        self, kernels: SearchKernels, logits_TE: Tensor, chosen_TK: Tensor, hidden_TD: Tensor
    ) -> GateForm | None:
        """None if the kernels cannot read this gate."""
        following, of_gate = self._following, (logits_TE, hidden_TD)
        is_readable = chosen_TK.dtype == torch.int64 and all(rows.dtype in DTYPE_CODES for rows in of_gate)
        if not is_readable or not all(rows.is_cpu for rows in (*of_gate, chosen_TK)):
            return None
        E, K = logits_TE.shape[1], chosen_TK.shape[1]
        if following is None:
            return kernels.gate_form(E, K, is_sigmoid=self._is_sigmoid)
        if following._matrix is None:
            return None
        return kernels.gate_form(
            E,
            K,
            is_sigmoid=self._is_sigmoid,
            matrix=following._matrix,
            bias=following._bias,
            next_is_sigmoid=following._is_sigmoid,
        )

    def _probabilities(self, logits_TE: np.ndarray) -> np.ndarray:
        """[T, E] from float32 logits: softmax, or sigmoid scores over their sum."""
        if self._is_sigmoid:
            scores = 0.5 + 0.5 * np.tanh(0.5 * logits_TE)
        else:
            scores = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)

    def _logits(self, hidden_TD: np.ndarray) -> np.ndarray:
        if self._matrix is None:
            rows = torch.from_numpy(hidden_TD).to(next(self.gate.parameters()).dtype)
            with torch.inference_mode():  # forward, not the call: a call would run hooks
                return self.gate.forward(rows)[0].float().numpy()
        logits_TE = hidden_TD @ self._matrix
        return logits_TE if self._bias is None else logits_TE + self._bias

    def _take_matrix(self, weight: Tensor, bias: object) -> None:
        """Use the matrix if the gate's logits are its product with the rows and no more."""
        probe = torch.randn((4, weight.shape[1]), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        with torch.inference_mode():
            wanted = self.gate.forward(probe)[0].float().numpy()
        self._matrix = np.ascontiguousarray(weight.detach().float().numpy().T)
        self._bias = bias.detach().float().numpy() if isinstance(bias, Tensor) else None
        if not np.allclose(self._logits(probe.float().numpy()), wanted, rtol=0.05, atol=0.05):
            self._matrix = None


def gate_readers(model: nn.Module, kernels: SearchKernels | None = None) -> dict[int, GateReader]:
    """A reader for every gate of a model, by decoder layer, in order. Args: kernels: of `signal`; None: in numpy.

    Raises:
        CheckpointError: an experts module without a gate beside it.
    """
    readers: dict[int, GateReader] = {}
    following: GateReader | None = None
    for row, (layer, gate) in reversed(list(enumerate(gate_modules(model).items()))):
        following = readers[layer] = GateReader(row, gate, following, kernels)
    return dict(reversed(readers.items()))


def _contiguous(values: Tensor) -> Tensor:
    return values if values.is_contiguous() else values.contiguous()  # asking is cheaper than the call


def means(values_TX: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[S, X] means over each sequence's rows, which begin at `starts` [S]."""
    if len(starts) == len(values_TX):
        return values_TX
    lengths = np.diff(np.append(starts, len(values_TX)))
    return _sums(values_TX, starts) / lengths[:, None].astype(np.float32)


def _sums(values_TX: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return values_TX if len(starts) == len(values_TX) else np.add.reduceat(values_TX, starts, axis=0)


def _takes_rows_alone(gate: nn.Module) -> bool:
    parameters = list(inspect.signature(type(gate).forward).parameters.values())[2:]  # after self and the rows
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not inspect.Parameter.empty or p.kind in variadic for p in parameters)


def _is_sigmoid(gate: nn.Module) -> bool:
    return "sigmoid" in inspect.unwrap(type(gate).forward).__code__.co_names


def gate_probability(gate: nn.Module) -> Callable[[Tensor], Tensor]:
    """From logits [T, E] to probabilities [T, E] float32: softmax, or sigmoid scores over their sum."""
    if _is_sigmoid(gate):
        return _normalised_sigmoid
    return partial(torch.softmax, dim=-1, dtype=torch.float32)


def _normalised_sigmoid(logits: Tensor) -> Tensor:
    scores = logits.float().sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True)
