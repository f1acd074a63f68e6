"""FP8 e4m3 with one scale per block of weights, as DeepSeek-V3 is released (blocks of 128 x 128).

The scale tensor is called `weight_scale_inv`; a weight is its code times the block's scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels.native import DTYPE_CODES, FP8_CODE
from actors.weights.formats.base import Matrix

_COLUMN_STEP = 32  # the kernel decodes so many columns at once, with one scale


@dataclass(frozen=True, slots=True)
class Fp8BlockFormat:
    """e4m3 codes [rows, cols], scales [ceil(rows / block_rows), ceil(cols / block_cols)]."""

    block_rows: int
    block_cols: int
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Raises ValueError: blocks that the kernel cannot take."""
        if self.block_rows < 1 or self.block_cols < 1 or self.block_cols % _COLUMN_STEP:
            raise ValueError(
                f"FP8 blocks of {self.block_rows} x {self.block_cols} are not supported; "
                f"the number of columns must be a multiple of {_COLUMN_STEP}"
            )

    @property
    def name(self) -> str:
        return f"fp8 e4m3, blocks of {self.block_rows}x{self.block_cols}"

    @property
    def has_scales(self) -> bool:
        return True

    def data_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows, cols)

    def scales_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (-(-rows // self.block_rows), -(-cols // self.block_cols))

    def scales_name(self, data_name: str) -> str:
        return f"{data_name}_scale_inv"

    def kernel_fields(self) -> dict[str, int]:
        return {
            "format": FP8_CODE,
            "scale_dtype": DTYPE_CODES[self.scale_dtype],
            "block_rows": self.block_rows,
            "block_cols": self.block_cols,
        }

    def dequantize(self, matrix: Matrix) -> Tensor:
        assert matrix.scales is not None
        cols = matrix.data.shape[1]
        weights = matrix.data.float()
        scales = matrix.scales.float().repeat_interleave(self.block_cols, 1)[:, :cols]
        for i in range(len(scales)):  # block row by block row: no second tensor of the weights' size
            weights[i * self.block_rows : (i + 1) * self.block_rows] *= scales[i]
        return weights

    def random(self, rows: int, cols: int) -> Matrix:
        scales = torch.full(self.scales_shape(rows, cols), 0.01, dtype=self.scale_dtype)
        return Matrix((100 * torch.randn(rows, cols)).to(torch.float8_e4m3fn), scales)
