"""What stored bytes mean, by the formats' definitions; and activations that are not plain gating."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from actors.weights.activation_functions import Activation, activation_of
from actors.weights.formats.base import Matrix
from actors.weights.formats.dense import DenseFormat
from actors.weights.formats.expert import ExpertForm, ExpertWeights
from actors.weights.formats.fp8_block import Fp8BlockFormat
from actors.weights.formats.mxfp4 import Mxfp4Format
from cluster.errors import CheckpointError


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_weight_is_its_code_times_the_scale_of_its_block(scale_dtype: torch.dtype) -> None:
    weights = Fp8BlockFormat(8, 32, scale_dtype)
    codes = torch.randn(19, 70).to(torch.float8_e4m3fn)
    scales = torch.rand(weights.scales_shape(19, 70)).to(scale_dtype)

    got = weights.dequantize(Matrix(codes, scales))

    assert weights.scales_shape(19, 70) == (3, 3)
    for row in range(19):
        for col in range(70):
            assert got[row, col] == codes[row, col].float() * scales[row // 8, col // 32].float()


def test_mxfp4_values_follow_the_standard() -> None:
    """Every code in both nibbles and every finite exponent: (-1)^s * 2^(e - 1) * (1 + m / 2), subnormal for e = 0."""
    weights = Mxfp4Format()
    exponents = torch.arange(255, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(255, -1, -1).contiguous()

    got = weights.dequantize(Matrix(codes, exponents[:, None].expand(-1, 16).contiguous()))

    assert weights.data_shape(255, 512) == codes.shape
    for exponent in (0, 1, 120, 127, 200, 254):
        for code in range(256):
            for place, nibble in enumerate((code & 15, code >> 4)):
                sign, e, m = nibble >> 3, nibble >> 1 & 3, nibble & 1
                magnitude = 2.0 ** (e - 1) * (1 + m / 2) if e else m / 2
                expected = torch.tensor((-1) ** sign * magnitude * 2.0 ** (exponent - 127))
                assert got[exponent, 2 * code + place] == expected, (exponent, code, place)


def test_formats_refuse_sizes_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match="whole blocks of 32"):
        Mxfp4Format().data_shape(8, 40)
    with pytest.raises(ValueError, match="128 x 48"):
        Fp8BlockFormat(128, 48)


def test_clamped_swiglu_is_that_of_gpt_oss() -> None:
    gate, up = 8 * torch.randn(2, 200, dtype=torch.float64)

    got = Activation("clamped_swiglu", 1.702, 7.0)(gate, up)

    for g, u, value in zip(gate.tolist(), up.tolist(), got.tolist(), strict=True):
        g, u = min(g, 7.0), max(-7.0, min(u, 7.0))
        assert math.isclose(value, (u + 1) * g / (1 + math.exp(-1.702 * g)), rel_tol=1e-12)


class _Module(torch.nn.Module):
    """What an experts module of transformers offers for recognition."""

    def __init__(self, formula: str, *, is_concatenated: bool) -> None:
        super().__init__()
        self.is_concatenated, self.alpha, self.limit = is_concatenated, 1.5, 6.0
        self._formula = formula

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.is_concatenated:
            gate, up = gate_up.chunk(2, dim=-1)
        else:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        if self._formula == "swapped":
            return torch.nn.functional.silu(up) * gate
        if self._formula == "clamped":
            glu = gate.clamp(max=self.limit) * torch.sigmoid(gate.clamp(max=self.limit) * self.alpha)
            return (up.clamp(-self.limit, self.limit) + 1) * glu
        return torch.nn.functional.gelu(gate, approximate="tanh") * up


@pytest.mark.parametrize("is_concatenated", [True, False])
def test_activations_are_recognised_by_their_results(is_concatenated: bool) -> None:
    found = activation_of(_Module("clamped", is_concatenated=is_concatenated))

    assert found == Activation("clamped_swiglu", 1.5, 6.0)
    assert activation_of(_Module("gelu", is_concatenated=is_concatenated)).name == "gelu_pytorch_tanh"
    with pytest.raises(CheckpointError, match="_Module"):
        activation_of(_Module("swapped", is_concatenated=is_concatenated))


def test_form_names_its_parts_and_their_shapes() -> None:
    form = ExpertForm(format=Mxfp4Format(), activation=Activation("silu"), interleaved=True, bias_dtype=torch.bfloat16)

    shapes = {part: form.shape(part, 64, 96) for part in form.part_names}

    assert shapes == {
        "gate_up": (192, 2, 16), "down": (64, 3, 16), "gate_up_scales": (192, 2), "down_scales": (64, 3),
        "gate_up_bias": (192,), "down_bias": (64,),
    }  # fmt: skip
    transposed = ExpertForm(format=DenseFormat(torch.float32), activation=Activation("silu"), transposed=True)
    assert {p: transposed.shape(p, 64, 96) for p in transposed.part_names} == {"gate_up": (64, 192), "down": (96, 64)}
    assert pickle.loads(pickle.dumps(form)) == form


def test_only_plain_floats_are_converted() -> None:
    silu = Activation("silu")
    dense = ExpertForm(format=DenseFormat(torch.float32), activation=silu, bias_dtype=torch.float32)
    packed = ExpertForm(format=Mxfp4Format(), activation=silu)

    assert dense.held_as(torch.bfloat16).format == DenseFormat(torch.bfloat16)
    assert dense.held_as(torch.bfloat16).bias_dtype == torch.bfloat16
    assert packed.held_as(torch.bfloat16) == packed


def test_pointers_are_those_of_the_parts() -> None:
    form = ExpertForm(format=DenseFormat(torch.float32), activation=Activation("silu"), transposed=True)
    gate_up, down = torch.zeros(4, 6), torch.zeros(3, 4)

    expert = ExpertWeights.of(form, (gate_up, down))

    assert expert.pointers.gate == gate_up.data_ptr()
    assert expert.pointers.up == gate_up.data_ptr() + 3 * 4
    assert expert.pointers.down == down.data_ptr()
    assert expert.pointers.gate_scales is None and expert.pointers.down_bias is None
