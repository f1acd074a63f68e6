"""Puts an engine together from a configuration: model, expert memory, kernels, batcher.

The composition root of one attention worker's process; knows every class of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actors.engine.batcher import Batcher
from actors.engine.engine import Engine
from actors.engine.kv_blocks import KvBlocks
from actors.engine.model_runner import ModelRunner
from actors.experts.budget import expert_budget
from actors.experts.compute import ExpertCompute
from actors.experts.dispatch import LocalDispatcher
from actors.experts.policies.lru import LruPolicy
from actors.experts.reader import ExpertReader
from actors.experts.store import TORCH_DTYPES, ExpertStore, held_expert_bytes
from actors.kernels.native import load_native
from actors.model.checkpoint import LoadedModel, load_model
from actors.model.fast_modules import speed_up
from cluster.config import MoesaicConfig, parse_size
from cluster.errors import ConfigError
from cluster.model_info import ModelInfo
from cluster.types import StartupPhase


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The engine and the parts that status and statistics look at."""

    engine: Engine
    store: ExpertStore
    dispatcher: LocalDispatcher
    compute: ExpertCompute
    dtype: torch.dtype


def build_engine(
    config: MoesaicConfig, info: ModelInfo, *, threads: int, on_phase: Callable[[StartupPhase], None] = lambda _: None
) -> EngineParts:
    """Load the model and make it ready to step.

    Raises:
        ConfigError: a budget too small; names the field and the minimum.
        CheckpointError: the checkpoint is damaged or unsupported.
    """
    torch.set_num_threads(threads)
    on_phase(StartupPhase.LOADING)
    loaded = load_model(info, config.model.dtype)
    native = load_native(threads=threads)
    num_blocks = _num_blocks(config, info, loaded)
    store = _build_store(config, loaded)
    compute = ExpertCompute(native, activation=loaded.activation, compute_dtype=loaded.dtype)
    on_phase(StartupPhase.CALIBRATING)
    compute.calibrate(store.held_dtype, loaded.layout.hidden, loaded.layout.intermediate)
    native_rows = speed_up(loaded.model, native) if native else 0
    dispatcher = LocalDispatcher(store, compute)
    block_size = config.attention.block_size
    runner = ModelRunner(
        loaded, dispatcher, native, num_blocks=num_blocks, block_size=block_size, native_rows=native_rows
    )
    batcher = Batcher(
        KvBlocks(num_blocks, block_size),
        max_batch_tokens=config.attention.max_batch_tokens,
        max_running=config.attention.max_running,
        max_queue=config.attention.max_queue,
    )
    engine = Engine(runner, batcher, max_model_len=info.max_model_len, eos_token_ids=info.eos_token_ids)
    return EngineParts(engine, store, dispatcher, compute, loaded.dtype)


def _build_store(config: MoesaicConfig, loaded: LoadedModel) -> ExpertStore:
    layout = loaded.layout
    stored = TORCH_DTYPES[layout.stored_dtype]
    # In float32 the stored narrow values are widened in the kernel, which is exact: never hold more bytes than stored.
    held = stored if stored.itemsize <= loaded.dtype.itemsize else loaded.dtype
    reader = ExpertReader(
        {part.file for expert in layout.experts.values() for part in expert.parts},
        direct_io=config.experts.direct_io == "auto",
    )

    return ExpertStore(
        layout,
        reader,
        LruPolicy(),
        budget_bytes=expert_budget(
            config.experts.cache,
            total_bytes=held_expert_bytes(layout, held),
            kv_bytes=parse_size(config.attention.kv_cache),
        ),
        held_dtype=held,
        min_experts=loaded.top_k,
        io_threads=config.experts.io_threads,
    )


def _num_blocks(config: MoesaicConfig, info: ModelInfo, loaded: LoadedModel) -> int:
    text = loaded.model.config.get_text_config()
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * dim * loaded.dtype.itemsize
    block_bytes = token_bytes * config.attention.block_size
    num_blocks = parse_size(config.attention.kv_cache) // block_bytes
    needed = -(-info.max_model_len // config.attention.block_size) + 1  # block 0 is for padding
    if num_blocks < needed:
        raise ConfigError(
            f"config field attention.kv_cache: {config.attention.kv_cache} is {num_blocks} blocks of {block_bytes} B, "
            f"one sequence of {info.max_model_len} tokens needs {needed}; give at least {needed * block_bytes} bytes "
            f"or lower model.max_model_len"
        )
    return num_blocks
