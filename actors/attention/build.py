"""Puts an engine together from a configuration: model, experts here or on hosts, kernels, batcher.

The composition root of one attention worker's process; knows every class of the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from actors.data_plane.connect import Connector, stream_limits
from actors.engine.attention_check import AttentionCheck
from actors.engine.batcher import Batcher
from actors.engine.engine import Engine
from actors.engine.kv_blocks import KvBlocks
from actors.engine.loaded_engine import LoadedEngine
from actors.engine.model_runner import ModelRunner
from actors.engine.signal_tap import SignalTap
from actors.expert_client.dispatch import HostDispatcher
from actors.expert_client.host_connections import HostConnections, Locate
from actors.expert_client.host_memory import HostMemory
from actors.expert_client.local_memory import LocalMemory
from actors.experts.backend import ExpertBackend
from actors.experts.build import BackendBuilder
from actors.experts.dispatch import Dispatcher, LocalDispatcher
from actors.experts.lease import closed_on_error, open_lease
from actors.experts.memory.shelves import Shelves, remote_source
from actors.experts.policy_runner import PolicyRunner
from actors.gates.activation_recorder import ActivationRecorder
from actors.kernels.native import load_native
from actors.kernels.sampling import load_sampling_kernel
from actors.model.checkpoint import LoadedModel, load_model
from actors.model.fast_modules import speed_up
from cluster.config.load import MoesaicConfig
from cluster.config.sizes import AUTO
from cluster.model.info import ModelInfo
from cluster.model.kv_budget import USUAL_BYTES, blocks_for, plan_kv, value_bytes, values_per_token
from cluster.node_memory.leases import MemoryLease
from cluster.semantics.co_batching import CoBatching
from cluster.semantics.request_mix import RequestMix
from cluster.types import StartupPhase

_HOSTS_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAccess:
    """How a worker finds its expert hosts. `locate` may raise while a host starts."""

    worker_id: str
    locate: Locate


def build_engine(
    config: MoesaicConfig,
    info: ModelInfo,
    *,
    threads: int,
    hosts: HostAccess | None = None,
    shelves: Shelves | None = None,
    num_nodes: int = 1,
    on_phase: Callable[[StartupPhase], None] = lambda _: None,
) -> LoadedEngine:
    """Load the model and make it ready to step.

    Args:
        shelves: where other nodes keep experts, if they do.
        num_nodes: that the workers and hosts spread over.

    Raises:
        ConfigError: a budget too small; names the field and the minimum.
        CheckpointError: the checkpoint is damaged or unsupported.
        Unavailable: an expert host cannot be reached.
    """
    lease = open_lease(config, info, num_nodes)
    with closed_on_error(lease):
        parts = _build(config, info, lease, threads=threads, hosts=hosts, shelves=shelves, on_phase=on_phase)
        lease.settle()
        return parts


def _build(
    config: MoesaicConfig,
    info: ModelInfo,
    lease: MemoryLease,
    *,
    threads: int,
    hosts: HostAccess | None,
    shelves: Shelves | None,
    on_phase: Callable[[StartupPhase], None],
) -> LoadedEngine:
    torch.set_num_threads(threads)
    on_phase(StartupPhase.LOADING)
    expected, kv_bytes = values_per_token(info.config), 0
    if expected is not None:  # what cannot be is said before weights are loaded
        expected *= value_bytes(info.config, config.model.dtype)
        kv_bytes = _take_kv(config, info, lease, expected)
    loaded = load_model(info, config.model.dtype)
    native = load_native(threads=threads)
    lease.note_loaded()
    if (token_bytes := _token_bytes(loaded)) != expected:
        kv_bytes = _take_kv(config, info, lease, token_bytes)
    num_blocks = kv_bytes // (token_bytes * config.attention.block_size)
    builder = BackendBuilder(config.experts, loaded, native, lease)
    on_phase(StartupPhase.CALIBRATING)
    builder.calibrate()
    check = AttentionCheck.prepare(loaded)
    native_rows = speed_up(loaded.model, native) if native else 0
    check.verify(native, native_rows)
    recorder = ActivationRecorder(loaded.layout.layers, loaded.layout.num_experts, native)
    co_batching = CoBatching() if config.attention.co_batching else CoBatching(max_overtaken=0)
    backend: ExpertBackend | None
    links: HostConnections | None = None
    policy_runner: PolicyRunner | None = None
    if hosts is None or not config.experts.hosts:
        budget = builder.budget("experts.cache", config.experts.cache)
        timeout_s, sources = config.experts.load_timeout_s, ()
        if shelves is not None:
            sources = (remote_source(shelves, fingerprint=info.fingerprint, load_timeout_s=timeout_s),)
        mix = _mix(config, co_batching)
        backend, policy_runner = builder.build_with_policies(budget, sources, mix)
        dispatcher: Dispatcher = LocalDispatcher(backend, recorder, policy_runner)
    else:
        backend = _local_backend(config, builder)
        on_phase(StartupPhase.CONNECTING)
        links = _connect_hosts(config, info, loaded, hosts)
        memory, policy_runner = _host_policies(config, builder, links, co_batching)
        dispatcher = HostDispatcher(
            links,
            LocalMemory(backend, builder.build_smallest, recorder),
            recorder,
            num_experts=loaded.layout.num_experts,
            timeout_s=config.experts.host_timeout_s,
            memory=memory,
            policy_runner=policy_runner,
        )
    block_size = config.attention.block_size
    runner = ModelRunner(
        loaded, dispatcher, native, num_blocks=num_blocks, block_size=block_size, native_rows=native_rows
    )
    if policy_runner is not None:
        runner.signals = SignalTap(loaded.model, policy_runner)
    batcher = Batcher(
        KvBlocks(num_blocks, block_size),
        max_batch_tokens=config.attention.max_batch_tokens,
        max_running=config.attention.max_running,
        max_queue=config.attention.max_queue,
        co_batching=co_batching,
    )
    engine = Engine(
        runner,
        batcher,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        recorder=recorder,
        sampling_kernel=load_sampling_kernel() if native else None,
    )
    return LoadedEngine(
        engine,
        dispatcher,
        recorder,
        backend,
        policy_runner,
        links,
        loaded.layout,
        loaded.top_k,
        builder.compute.plan.label,
        loaded.dtype,
        lease,
        loaded.problems,
    )


def _host_policies(
    config: MoesaicConfig, builder: BackendBuilder, links: HostConnections, co_batching: CoBatching
) -> tuple[HostMemory | None, PolicyRunner | None]:
    """The configured policies over the memory of all hosts; none where hosts need nobody's word."""
    memory = HostMemory(builder.grid, links)
    policies, meter = builder.build_policies(memory.num_slots, _mix(config, co_batching))
    if not policies.listeners and policies.predictor is None:
        return None, None
    memory.set_policies(policies)
    return memory, PolicyRunner(memory, policies, memory, meter)


def _mix(config: MoesaicConfig, co_batching: CoBatching) -> RequestMix | None:
    """What a worker's requests use; where several workers could share it out."""
    several = max(config.attention.workers, config.attention.max_workers or 0) > 1
    return co_batching.mix if several else None


def _local_backend(config: MoesaicConfig, builder: BackendBuilder) -> ExpertBackend | None:
    """Experts in a worker's own memory beside hosts: none unless they are asked for."""
    if config.experts.cache == AUTO:
        return None
    budget = builder.budget("experts.cache", config.experts.cache)
    return builder.build(budget) if budget else None


def _connect_hosts(config: MoesaicConfig, info: ModelInfo, loaded: LoadedModel, hosts: HostAccess) -> HostConnections:
    connector = Connector(
        config.experts.carrier,
        worker_id=hosts.worker_id,
        fingerprint=info.fingerprint,
        max_rows=config.attention.max_batch_tokens,
        dim=loaded.layout.hidden,
        top_k=loaded.top_k,
        checked=config.experts.checksums,
        limits=stream_limits(config.experts),
    )
    layout = loaded.layout
    links = HostConnections(
        config.experts.hosts, hosts.locate, connector.connect, layers=layout.layers, num_experts=layout.num_experts
    )
    links.start(_HOSTS_TIMEOUT_S)
    return links


def _token_bytes(loaded: LoadedModel) -> int:
    """Of the KV cache, as it is seen what each layer keeps."""
    return sum(layer.values_per_token for layer in loaded.attention) * loaded.dtype.itemsize


def _take_kv(config: MoesaicConfig, info: ModelInfo, lease: MemoryLease, token_bytes: int) -> int:
    """Bytes of KV cache, promised to this process: at least one sequence's.

    Raises:
        ConfigError: they are not there, or too few are configured.
    """
    attention, field = config.attention, "attention.kv_cache"
    available = 0
    if attention.kv_cache == AUTO:
        block_bytes = token_bytes * attention.block_size
        most = max(USUAL_BYTES, blocks_for(info.max_model_len, attention.block_size) * block_bytes)
        available = lease.take(field, most=most)
    plan = plan_kv(
        attention.kv_cache,
        token_bytes=token_bytes,
        block_size=attention.block_size,
        model_len=info.max_model_len,
        is_asked=True,
        available_bytes=available,
    )
    lease.book(field, plan.num_bytes)
    return plan.num_bytes
