"""The form that all experts of a model share, and one resident expert in it. Knows matrices, not files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actors.experts.activations import Activation
from actors.experts.formats.base import Matrix, WeightFormat
from actors.experts.formats.dense import DenseFormat
from actors.kernels.native import DTYPE_CODES, ExpertPointers, KernelForm


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


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One resident expert, as views of its slot. `gate` is gate and up where they are interleaved, `up` None then."""

    gate: Matrix
    up: Matrix | None
    down: Matrix
    pointers: ExpertPointers

    @staticmethod
    def of(form: ExpertForm, parts: Sequence[Tensor]) -> ExpertWeights:
        """Args: parts: in the order of form.part_names."""
        tensors = dict(zip(form.part_names, parts, strict=True))

        def matrix(name: str) -> Matrix:
            return Matrix(tensors[name], tensors.get(f"{name}_scales"), tensors.get(f"{name}_bias"))

        if form.interleaved:
            gate, up = matrix("gate_up"), None
        elif form.transposed:
            gate, up = matrix("gate_up").column_halves()
        else:
            gate, up = matrix("gate"), matrix("up")
        down = matrix("down")
        pointers = ExpertPointers(
            **{
                field + kind: tensor.data_ptr()
                for field, held in (("gate", gate), ("up", up), ("down", down))
                if held is not None
                for kind, tensor in (("", held.data), ("_scales", held.scales), ("_bias", held.bias))
                if tensor is not None
            }
        )
        return ExpertWeights(gate, up, down, pointers)

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
