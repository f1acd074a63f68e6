"""What one MoE layer asks for.

Shapes: T token rows, D model dim, K experts per token (top-k).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertWork:
    """What one MoE layer asks for: rows, the gate's choice and its weights.

    clusters_T: int32, the cluster of prompts that each row belongs to, -1 for none; None: none of the rows has one.
    """

    layer: int
    hidden_TD: Tensor
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    clusters_T: Tensor | None = None
