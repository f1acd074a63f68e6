"""What an expert does with gate and up. Knows the functions and how to recognise them; no weights, no kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.kernels.native import ACTIVATION_CODES
from cluster.errors import CheckpointError

CLAMPED_SWIGLU = "clamped_swiglu"

_OF_GATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, slots=True)
class Activation:
    """Gated activation by name: f(gate) * up, or GPT-OSS' clamped SwiGLU with its constants alpha and limit.

    Raises:
        CheckpointError: no such activation.
    """

    name: str
    alpha: float = 1.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        if self.name not in _OF_GATE and self.name != CLAMPED_SWIGLU:
            raise CheckpointError(f"config.json: hidden_act {self.name!r} of the experts is not supported")

    @property
    def kernel_fields(self) -> dict[str, int | float] | None:
        """Fields of KernelForm, or None where only torch computes it."""
        code = ACTIVATION_CODES.get(self.name)
        return None if code is None else {"activation": code, "alpha": self.alpha, "limit": self.limit}

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """Hidden neurons [T, I] from gate and up [T, I]."""
        if self.name != CLAMPED_SWIGLU:
            return _OF_GATE[self.name](gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def activation_of(module: nn.Module) -> Activation:
    """What a transformers experts module applies, found by its results, so that a family with a formula of its own
    cannot pass for a common one.

    Raises:
        CheckpointError: none of the known ones; names the module's class.
    """
    generator = torch.Generator().manual_seed(0)
    gate, up = (4 * torch.randn(8, 64, generator=generator) for _ in range(2))
    gate_up = torch.cat((gate, up), dim=-1) if module.is_concatenated else torch.stack((gate, up), dim=-1).flatten(-2)
    expected: Tensor = module._apply_gate(gate_up)  # type: ignore[operator]
    candidates = [Activation(name) for name in _OF_GATE]
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, int | float) and isinstance(limit, int | float):
        candidates.append(Activation(CLAMPED_SWIGLU, float(alpha), float(limit)))
    for candidate in candidates:
        if torch.allclose(candidate(gate, up), expected, rtol=1e-5, atol=1e-5):
            return candidate
    raise CheckpointError(f"config.json: the activation of {type(module).__name__} is not supported")
