"""Plain floats: bf16, fp16 or fp32, one number an element."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels.native import DTYPE_CODES
from actors.weights.formats.base import Matrix


@dataclass(frozen=True, slots=True)
class DenseFormat:
    """Weights of one float dtype, without scales."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def has_scales(self) -> bool:
        return False

    def data_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows, cols)

    def scales_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return ()

    def scales_name(self, data_name: str) -> str:
        raise ValueError(f"{data_name}: plain floats have no scales")

    def kernel_fields(self) -> dict[str, int]:
        return {"format": DTYPE_CODES[self.dtype]}

    def dequantize(self, matrix: Matrix) -> Tensor:
        return matrix.data

    def random(self, rows: int, cols: int) -> Matrix:
        return Matrix(torch.randn(rows, cols).to(self.dtype))
