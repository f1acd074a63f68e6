"""What every weight format says of one matrix. Knows shapes and numbers; knows nothing of files or experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
FLOAT_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix as held: `data` and `scales` as its format stores them, bias [out] or none."""

    data: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    def column_halves(self) -> tuple[Matrix, Matrix]:
        """Gate and up of a transposed [in, 2 * out] matrix, as views."""
        out = self.data.shape[1] // 2
        biases = (None, None) if self.bias is None else (self.bias[:out], self.bias[out:])
        return Matrix(self.data[:, :out], None, biases[0]), Matrix(self.data[:, out:], None, biases[1])


class WeightFormat(Protocol):
    """How the numbers of one matrix [rows, cols] are stored; held in memory exactly so."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def has_scales(self) -> bool:
        """Whether a second tensor holds scales."""
        ...

    def data_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Raises ValueError, with the reason: no such matrix in this format."""
        ...

    def scales_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Of the scales tensor; empty without scales."""
        ...

    def scales_name(self, data_name: str) -> str:
        """What checkpoints call the scales of a tensor."""
        ...

    def kernel_fields(self) -> dict[str, int]:
        """Fields of KernelForm that describe this format."""
        ...

    def dequantize(self, matrix: Matrix) -> Tensor:
        """The weights [rows, cols] as floats; exact where they are float32."""
        ...

    def random(self, rows: int, cols: int) -> Matrix:
        """A matrix of plausible numbers, for calibration."""
        ...
