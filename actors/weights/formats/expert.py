"""The form that all experts of a model share, and one resident expert in it. Knows matrices, not files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from actors.kernels.native import DTYPE_CODES, ExpertPointers, KernelForm
from actors.weights.activation_functions import Activation
from actors.weights.formats.base import Matrix, WeightFormat
from actors.weights.formats.dense import DenseFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """Format, orientation, how gate and up join, bias and activation of a model's experts.

    transposed: matrices are [in, out], gate and up side by side in one; else [out, in].
    interleaved: gate and up are one matrix, whose outputs are gate 0, up 0, gate 1, up 1 ...
    bias_dtype: None without bias.
    """

    format: WeightFormat
    activation: Activation
    transposed: bool = False
    interleaved: bool = False
    bias_dtype: torch.dtype | None = None

    @property
    def matrices(self) -> tuple[str, ...]:
        """The stored matrices of one expert."""
        return ("gate_up", "down") if self.transposed or self.interleaved else ("gate", "up", "down")

    @property
    def part_names(self) -> tuple[str, ...]:
        """The stored parts of one expert, in order: matrices, their scales, their biases."""
        names = self.matrices
        if self.format.has_scales:
            names += tuple(f"{matrix}_scales" for matrix in self.matrices)
        if self.bias_dtype is not None:
            names += tuple(f"{matrix}_bias" for matrix in self.matrices)
        return names

    def shape(self, part: str, hidden: int, intermediate: int) -> tuple[int, ...]:
        """Of a part in the checkpoint and in memory.

        Raises:
            ValueError: the format has no such matrix; says why.
        """
        matrix, _, kind = part.replace("gate_up", "gate-up").partition("_")
        neurons = 2 * intermediate if matrix == "gate-up" else intermediate
        rows, cols = (hidden, intermediate) if matrix == "down" else (neurons, hidden)
        if kind == "bias":
            return (rows,)
        if kind == "scales":
            return self.format.scales_shape(rows, cols)
        return self.format.data_shape(*((cols, rows) if self.transposed else (rows, cols)))

    def held_as(self, dtype: torch.dtype) -> ExpertForm:
        """The same experts with plain float weights converted to `dtype`; packed formats stay as they are."""
        if not isinstance(self.format, DenseFormat):
            return self
        return replace(self, format=DenseFormat(dtype), bias_dtype=None if self.bias_dtype is None else dtype)

    def kernel_form(self) -> KernelForm | None:
        """For the compiled kernel; None where it lacks the activation."""
        activation = self.activation.kernel_fields
        if activation is None:
            return None
        return KernelForm(
            transposed=self.transposed,
            joined=self.interleaved,
            bias_dtype=DTYPE_CODES[self.bias_dtype or torch.float32],
            **self.format.kernel_fields(),
            **activation,
        )


Matrices: TypeAlias = tuple[Matrix, Matrix | None, Matrix]
"""Gate, up and down; gate is gate and up where they are interleaved, up None then."""


class ExpertWeights:
    """One resident expert, as the compiled kernel reads it; as tensors, which take ten times as much, once asked for.

    intermediate: its neurons.
    """

    __slots__ = ("_make", "_matrices", "intermediate", "pointers")

    def __init__(self, pointers: ExpertPointers, intermediate: int, make: Callable[[], Matrices]) -> None:
        """Args: make: views of the slot; called once at most."""
        self.pointers = pointers
        self.intermediate = intermediate
        self._make = make
        self._matrices: Matrices | None = None

    @property
    def has_tensors(self) -> bool:
        """Whether somebody asked for the matrices."""
        return self._matrices is not None

    @property
    def gate(self) -> Matrix:
        return self._all()[0]

    @property
    def up(self) -> Matrix | None:
        return self._all()[1]

    @property
    def down(self) -> Matrix:
        return self._all()[2]

    def _all(self) -> Matrices:
        if self._matrices is None:
            self._matrices = self._make()
        return self._matrices

    @staticmethod
    def of(form: ExpertForm, parts: Sequence[Tensor]) -> ExpertWeights:
        """Args: parts: in the order of form.part_names."""
        matrices = matrices_of(form, parts)
        gate, up, down = matrices
        pointers = ExpertPointers(
            **{
                field + kind: tensor.data_ptr()
                for field, held in (("gate", gate), ("up", up), ("down", down))
                if held is not None
                for kind, tensor in (("", held.data), ("_scales", held.scales), ("_bias", held.bias))
                if tensor is not None
            }
        )
        neurons = gate.data.shape[1 if form.transposed else 0]
        weights = ExpertWeights(pointers, neurons // 2 if up is None else neurons, lambda: matrices)
        weights._all()
        return weights

    @staticmethod
    def random(form: ExpertForm, hidden: int, intermediate: int) -> ExpertWeights:
        """Plausible weights, for calibration."""
        sizes = {"gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate)}
        matrices = {name: sizes.get(name, (intermediate, hidden)) for name in form.matrices}
        held = {n: form.format.random(*(size[::-1] if form.transposed else size)) for n, size in matrices.items()}
        parts: list[Tensor] = [matrix.data for matrix in held.values()]
        parts += [matrix.scales for matrix in held.values() if matrix.scales is not None]
        if form.bias_dtype is not None:
            parts += [torch.randn(rows).to(form.bias_dtype) for rows, _ in matrices.values()]
        return ExpertWeights.of(form, parts)


def matrices_of(form: ExpertForm, parts: Sequence[Tensor]) -> Matrices:
    """An expert's matrices. Args: parts: in the order of form.part_names."""
    tensors = dict(zip(form.part_names, parts, strict=True))

    def matrix(name: str) -> Matrix:
        return Matrix(tensors[name], tensors.get(f"{name}_scales"), tensors.get(f"{name}_bias"))

    if form.interleaved:
        return matrix("gate_up"), None, matrix("down")
    if form.transposed:
        return (*matrix("gate_up").column_halves(), matrix("down"))
    return matrix("gate"), matrix("up"), matrix("down")
