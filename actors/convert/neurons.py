"""Widening one gated MLP without changing what it computes.

Each hidden neuron becomes S neurons with the same gate and up rows; their down-projection columns
sum to the original column, and all neurons are shuffled. Split weights are random powers of two
(the leaves of a random binary tree), so every split column and their sum are exact in any float
type unless a value falls below the type's smallest one. Knows tensors; knows no files.
"""

# Shapes: D model dim, I hidden neurons, S factor.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def widen_mlp(matrices: Mapping[str, torch.Tensor], *, factor: int, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    """Widened "gate" [I*S, D], "up" [I*S, D] and "down" [D, I*S], and the residual.

    The residual is the largest |sum of split columns - column|, relative to the largest weight of "down".
    """
    import torch

    down = matrices["down"]  # [D, I]
    num_neurons = down.shape[1]
    generator = torch.Generator().manual_seed(seed)
    weights = _split_weights(num_neurons, factor, generator)  # [I, S]
    split = (down.float()[:, :, None] * weights).to(down.dtype)  # [D, I, S]
    error = (split.double().sum(dim=2) - down.double()).abs()
    residual = float(error.max() / down.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    order = torch.randperm(num_neurons * factor, generator=generator)
    origin = order // factor
    widened = {
        "gate": matrices["gate"][origin],
        "up": matrices["up"][origin],
        "down": split.reshape(down.shape[0], -1)[:, order].contiguous(),
    }
    return widened, residual


def _split_weights(num_neurons: int, factor: int, generator: torch.Generator) -> torch.Tensor:
    """[I, S]: per row, powers of two that sum to 1: halve a random leaf until there are S."""
    import torch

    weights = torch.zeros(num_neurons, factor)
    weights[:, 0] = 1.0
    rows = torch.arange(num_neurons)
    deepest = 2.0 ** -(factor.bit_length() + 2)  # keeps columns far from the smallest float16
    for leaves in range(1, factor):
        priority = torch.rand(num_neurons, leaves, generator=generator)
        priority[weights[:, :leaves] <= deepest] = -1.0
        chosen = priority.argmax(dim=1)
        half = weights[rows, chosen] / 2
        weights[rows, chosen] = half
        weights[:, leaves] = half
    return weights
