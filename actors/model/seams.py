"""Plugs our attention, experts and KV cache into transformers' models, through its own interfaces.

Knows transformers' calling conventions; knows nothing of scheduling. A model's attention and
experts modules carry a `moesaic` attribute (set by `bind`), which leads from the shared registered
functions back to the one runner that executes the model: no global state.

Shapes: T packed rows, H query heads, G key-value heads, C key dim, V value dim, D model dim, K top-k.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cluster.errors import CheckpointError

IMPLEMENTATION = "moesaic"


class SeamTarget(Protocol):
    """What the seams call: the runner of the model."""

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of the current step's packed rows: [1, H, T, C] in, [1, T, H, V] out."""
        ...

    def append_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store what the current step's rows leave behind: keys [1, G, T, C] and values [1, G, T, V], or latents."""
        ...

    def run_experts(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Routed experts of one layer: [T, D] in, [T, D] out. May suspend the forward."""
        ...


class LayerBinding:
    """Leads from a module to its runner and its layer index."""

    def __init__(self, target: SeamTarget, layer: int) -> None:
        self.target = target
        self.layer = layer


class PackedCache:
    """What the model sees as its cache: stores new keys and values, per sequence, in pages."""

    is_compileable = False

    def __init__(self, target: SeamTarget) -> None:
        self._target = target

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the step's rows; the attention function reads the pages, so the inputs go back as they are."""
        self._target.append_kv(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions are given explicitly."""
        return 0


def register_seams() -> None:
    """Make `attn_implementation="moesaic"` and `experts_implementation="moesaic"` known; idempotent."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)


def cache_argument(model: nn.Module) -> str:
    """Name of the argument that a model's forward takes its cache by: newer versions of transformers warn of the old
    one, and will drop it."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The routed-experts modules (those with transformers' experts decorator), by name, in layer order."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "is_transposed") and hasattr(m, "_apply_gate")}


def layer_of(name: str) -> int:
    """The decoder layer of a module name such as `model.layers.3.mlp.experts`."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    raise CheckpointError(f"module {name}: no layer index in its name; this model family is not supported")


def bind(model: nn.Module, target: SeamTarget) -> None:
    """Give every attention and experts module its way back to `target`."""
    for name, module in experts_modules(model).items():
        module.moesaic = LayerBinding(target, layer_of(name))  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config"):
            module.moesaic = LayerBinding(target, module.layer_idx)  # type: ignore[assignment, arg-type]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Keys, values, mask, window and sinks are not read here: the runner has them in its pages and layers."""
    binding: LayerBinding = module.moesaic  # type: ignore[assignment]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return binding.target.attend(binding.layer, query, scale), None


def _experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    binding: LayerBinding = module.moesaic  # type: ignore[assignment]
    return binding.target.run_experts(binding.layer, hidden_states, top_k_index, top_k_weights)
