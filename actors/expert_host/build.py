"""Puts a host's experts together from a configuration: memory, kernels, the way from other hosts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actors.experts.backend import ExpertBackend
from actors.experts.build import BackendBuilder
from actors.experts.lease import closed_on_error, open_lease
from actors.experts.memory.peer import PeerLink, Peers, peer_source
from actors.kernels.native import load_native
from actors.model.checkpoint import load_model
from cluster.config.load import MoesaicConfig
from cluster.model.info import ModelInfo
from cluster.node_memory.leases import MemoryLease
from cluster.placement import even_placement
from cluster.policies.eviction.score_snapshot import ScoreSnapshot

_SPARE = 0.125  # of what a host owns: room for replicas, and for what comes before something else may go


@dataclass(frozen=True, slots=True)
class HostBackend:
    """The experts of a host, those by layer that it owns at first, and the way from other hosts into its memory.

    scores: of the eviction, where workers say what experts are worth.
    """

    backend: ExpertBackend
    owned: dict[int, tuple[int, ...]]
    peers: PeerLink | None
    lease: MemoryLease
    scores: ScoreSnapshot | None


def build_host_backend(
    config: MoesaicConfig,
    info: ModelInfo,
    host_index: int,
    *,
    threads: int,
    peers: Peers | None = None,
    num_nodes: int = 1,
) -> HostBackend:
    """The experts of host `host_index`; one beyond those configured owns nothing at first. Args and errors as
    build_engine."""
    lease = open_lease(config, info, num_nodes)
    with closed_on_error(lease):
        built = _build_host(config, info, lease, host_index, threads=threads, peers=peers)
        lease.settle()
        return built


def _build_host(
    config: MoesaicConfig, info: ModelInfo, lease: MemoryLease, host_index: int, *, threads: int, peers: Peers | None
) -> HostBackend:
    torch.set_num_threads(threads)
    loaded = load_model(info, config.model.dtype, dense=False)
    lease.note_loaded()
    builder = BackendBuilder(config.experts, loaded, load_native(threads=threads), lease)
    builder.calibrate()
    layout, num_hosts = loaded.layout, config.experts.hosts
    shares = even_placement(layout.layers, layout.num_experts, num_hosts)
    owned = shares[host_index] if host_index < num_hosts else dict.fromkeys(layout.layers, ())
    largest = max(sum(len(experts) for experts in share.values()) for share in shares) / len(layout.experts)
    budget = builder.budget("experts.host_cache", config.experts.host_cache, share=min(1.0, largest * (1 + _SPARE)))
    links: list[PeerLink] = []
    sources = () if peers is None else (peer_source(peers, links.append),)
    backend, scores = builder.build_for_outlooks(budget, sources)
    return HostBackend(backend, owned, links[0] if links else None, lease, scores)
