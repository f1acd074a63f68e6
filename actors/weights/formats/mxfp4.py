"""MXFP4 as GPT-OSS is released: 4-bit floats in blocks of 32 with a shared power of two.

Format: OCP Microscaling Formats (MX) 1.0. A byte holds two e2m1 codes, the even column in the low four bits;
a scale byte s means 2^(s - 127).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.kernels.native import MXFP4_CODE
from actors.weights.formats.base import Matrix

_BLOCK = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Mxfp4Format:
    """Codes [rows, cols / 32, 16] and scales [rows, cols / 32], both bytes."""

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def has_scales(self) -> bool:
        return True

    def data_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        if cols % _BLOCK:
            raise ValueError(f"MXFP4 rows of {cols} weights are not whole blocks of {_BLOCK}")
        return (rows, cols // _BLOCK, _BLOCK // 2)

    def scales_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        return (rows, cols // _BLOCK)

    def scales_name(self, data_name: str) -> str:
        return f"{data_name.removesuffix('_blocks')}_scales"

    def kernel_fields(self) -> dict[str, int]:
        return {"format": MXFP4_CODE}

    def dequantize(self, matrix: Matrix) -> Tensor:
        assert matrix.scales is not None
        values = torch.tensor([*_E2M1, *(-v for v in _E2M1)])
        codes = matrix.data.int()
        weights = torch.stack((values[codes & 15], values[codes >> 4]), dim=-1).flatten(-2)
        scales = torch.ldexp(torch.ones(matrix.scales.shape), matrix.scales.int() - 127)
        return (weights * scales.unsqueeze(-1)).flatten(-2)

    def random(self, rows: int, cols: int) -> Matrix:
        codes = torch.randint(0, 256, self.data_shape(rows, cols), dtype=torch.uint8)
        return Matrix(codes, torch.full(self.scales_shape(rows, cols), 120, dtype=torch.uint8))
