"""Compiled kernels under test, and the sizes, dtypes and tolerances they are tested with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.kernels.native import NativeKernels, load_native

WEIGHT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUT_DTYPES = [torch.float32, torch.bfloat16]
ODD_SIZES = [(16, 8), (32, 48), (40, 24), (17, 33), (5, 3), (1, 1)]  # multiples of the vector, and not


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    kernels = load_native()
    assert kernels is not None
    return kernels


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to the rounding of `dtype`."""
    rtol, atol = (2e-4, 2e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol)
