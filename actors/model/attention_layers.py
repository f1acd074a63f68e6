"""What each layer's attention keeps per token and sees, learnt from the model itself.

One forward over two rows is watched: the keys and values each layer hands to its cache, the mask it asks for, the
arguments of its attention call. Nothing is derived from a family's config fields, so a model that does something
else than softmax attention over its own keys and values is refused here, by what it does.
Knows transformers' calling conventions; knows nothing of pages.

Shapes: T rows, H query heads, G key-value heads, C key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from actors.model.seams import IMPLEMENTATION, bind, cache_argument
from cluster.errors import CheckpointError

_WATCH = "moesaic-watch"
_NUM_ROWS = 2
_MAX_CONTEXT = 1 << 20  # far enough to see a window's edge
_HARMLESS = frozenset(  # arguments of an attention call that do not change what it computes here
    ("dropout", "position_ids", "use_cache", "output_attentions", "output_router_logits", "output_hidden_states",
     "cache_position", "logits_to_keep", "return_dict", "position_embeddings")
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """What one layer needs of the KV pages.

    key_shape, value_shape: per token, (G, C) and (G, V); of multi-head latent attention (1, latent dim) and
        (1, rotated dim).
    window: a row sees this many tokens, itself included; None: all before it.
    sinks: (H,) float32, one more score for each head.
    latent: the attention module that expands latents into keys and values, where the pages hold latents.
    """

    num_heads: int
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    window: int | None = None
    sinks: Tensor | None = None
    latent: nn.Module | None = None

    @property
    def values_per_token(self) -> int:
        """Numbers that one token occupies in the pages of this layer."""
        return self.key_shape[0] * self.key_shape[1] + self.value_shape[0] * self.value_shape[1]


def outline_attention(model: PreTrainedModel, *, top_k: int) -> tuple[AttentionLayer, ...]:
    """What each layer needs, from watching the model compute two rows; its routed experts count as zero.

    Args:
        top_k: experts per token, as the configuration has it; must be what the gates choose.

    Raises:
        CheckpointError: attention that the packed, paged forward does not reproduce; says what was seen.
    """
    AttentionInterface.register(_WATCH, _watched_attention)
    AttentionMaskInterface.register(_WATCH, _watched_mask)
    text = model.config.get_text_config()
    watcher = _Watcher(min(int(text.max_position_embeddings), _MAX_CONTEXT))
    bind(model, watcher)
    model.config._attn_implementation = _WATCH
    try:
        with torch.inference_mode():
            ids = torch.zeros((1, _NUM_ROWS), dtype=torch.int64)
            model(
                input_ids=ids,
                position_ids=torch.arange(_NUM_ROWS)[None],
                use_cache=True,
                logits_to_keep=torch.tensor([_NUM_ROWS - 1]),
                **{cache_argument(model): watcher},
            )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{type(model).__name__} cannot be served: its forward asks for more than keys and values of each layer "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        model.config._attn_implementation = IMPLEMENTATION
    return watcher.layers(int(text.num_hidden_layers), top_k, type(model).__name__)


def expand_latents(module: nn.Module, latents: Tensor, ropes: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [1, H, S, C] and values [1, H, S, V] of latents [1, 1, S, L] and rotated keys [1, 1, S, P]."""
    return type(module).expand_kv(module, latents, ropes)  # type: ignore[attr-defined]


def leave_latents(module: nn.Module) -> None:
    """From now on the module's forward hands latents to attention as they are; `expand_latents` still expands."""
    module.expand_kv = lambda latents, ropes: (latents, ropes)  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class _Mask:
    """Stands for an attention mask: causal, within `window` if there is one."""

    window: int | None


class _Watcher:
    """Cache, attention and experts of the watched forward."""

    is_compileable = False

    def __init__(self, context: int) -> None:
        self._context = context
        self._cached: dict[int, tuple[Tensor, Tensor]] = {}
        self._layers: dict[int, AttentionLayer] = {}
        self._top_k: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self._cached:
            raise CheckpointError(f"layer {layer_idx} caches keys and values twice; that is not supported")
        self._cached[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._context - _NUM_ROWS

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._context, 0

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        raise AssertionError("the watched forward has an attention function of its own")

    def append_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        raise AssertionError("the watched forward is its own cache")

    def run_experts(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        self._top_k.add(topk_ids.shape[-1])
        return torch.zeros_like(hidden)

    def watch(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        extra: dict[str, Any],
    ) -> Tensor:
        name = type(module).__name__
        sinks: Tensor | None = extra.pop("s_aux", None)
        is_causal = extra.pop("is_causal", True)
        odd = sorted(k for k, v in extra.items() if v is not None and k not in _HARMLESS)
        if odd:
            raise CheckpointError(f"layer {layer}: attention of {name} with {', '.join(odd)} is not supported")
        if not isinstance(mask, _Mask) or is_causal is False:
            raise CheckpointError(f"layer {layer}: attention of {name} is not causal; that is not supported")
        if layer in self._layers or layer not in self._cached:
            raise CheckpointError(f"layer {layer}: {name} attends to keys that are not the layer's own; not supported")
        kept_key, kept_value = self._cached[layer]
        latent = _latent_module(module, kept_key, kept_value)
        if latent is None and not (key is kept_key and value is kept_value):
            raise CheckpointError(f"layer {layer}: {name} changes keys after caching them; that is not supported")
        if not query.dtype == key.dtype == value.dtype == kept_key.dtype == kept_value.dtype:
            raise CheckpointError(
                f"layer {layer}: {name} mixes {query.dtype} queries and {key.dtype} keys; not supported"
            )
        self._layers[layer] = AttentionLayer(
            num_heads=query.shape[1],
            key_shape=(kept_key.shape[1], kept_key.shape[3]),
            value_shape=(kept_value.shape[1], kept_value.shape[3]),
            window=mask.window,
            sinks=None if sinks is None else sinks.detach().reshape(-1).float().clone(),
            latent=latent,
        )
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))

    def layers(self, num_layers: int, top_k: int, model: str) -> tuple[AttentionLayer, ...]:
        missing = sorted(set(range(num_layers)) - set(self._layers))
        if missing:
            raise CheckpointError(
                f"{model}: layers {missing} have no softmax attention over cached keys and values; not supported"
            )
        if self._top_k != {top_k}:
            raise CheckpointError(
                f"{model}: its gates choose {sorted(self._top_k)} experts per token, config.json says {top_k}"
            )
        return tuple(self._layers[layer] for layer in range(num_layers))


def _latent_module(module: nn.Module, key: Tensor, value: Tensor) -> nn.Module | None:
    """The module, if what it caches is a latent that `expand_kv` makes keys and values of."""
    rank = getattr(module, "kv_lora_rank", None)
    if not hasattr(module, "expand_kv") or key.shape[1] != 1 or value.shape[1] != 1 or key.shape[3] != rank:
        return None
    up = getattr(module, "kv_b_proj", None)
    if not isinstance(up, nn.Linear) or up.bias is not None or value.shape[3] != getattr(module, "qk_rope_head_dim", 0):
        return None
    return module


def _watched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    binding: Any = module.moesaic
    return binding.target.watch(module, binding.layer, query, key, value, attention_mask, extra), None


def _watched_mask(*_: Any, mask_function: Callable[..., Tensor], kv_length: int, **__: Any) -> _Mask:
    """The window of a mask, read off what rows near, far and in between may see of `kv_length` positions."""
    last = kv_length - 1
    rows = torch.tensor(sorted({0, last // 3, last // 2, max(last - 1, 0), last}))[:, None]
    columns = torch.arange(kv_length)[None, :]
    visible = mask_function(torch.tensor(0), torch.tensor(0), rows, columns).expand(len(rows), kv_length)
    window = int(visible[-1].sum())
    if not torch.equal(visible, (columns <= rows) & (columns > rows - window)):
        raise CheckpointError("the attention mask is neither causal nor a sliding window; that is not supported")
    return _Mask(None if window == kv_length else window)
