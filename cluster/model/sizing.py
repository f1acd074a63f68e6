"""How many bytes a model takes on nodes of a given memory: per worker, per expert host, and what to set. Pure.

As the server plans it: 70% of a node's memory are planned for, the rest is for the processes themselves, activations
and other programs.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.model.kv_budget import USUAL_BYTES, blocks_for
from cluster.node_memory.share import SHARE

_BLOCK_TOKENS = 16
_SPARE = 0.125  # of what a host owns, beside it: room for replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model as a process holds them.

    dense_bytes: of all weights but routed experts, and of stored buffers. token_bytes: of one token in the KV cache of
    all layers. expert_bytes: of one expert in memory. num_experts: of one layer. context: tokens a sequence may have.
    """

    dense_bytes: int
    token_bytes: int
    expert_bytes: int
    num_layers: int
    num_experts: int
    top_k: int
    context: int

    @property
    def all_experts_bytes(self) -> int:
        """What 100% of an expert cache means."""
        return self.num_layers * self.num_experts * self.expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """Equal nodes of so many bytes each, and the processes that spread evenly over them."""

    nodes: int
    node_bytes: int
    workers: int = 1
    hosts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """Bytes of each process, and of the fullest node. `fits`: the server can start; `resident_share`: part of the
    routed experts that is in memory, 1: nothing is read from disk while it serves.

    cache_bytes: a worker's expert cache. host_bytes: an expert host's. ram_tier_bytes: none here, a worker's cache is
    itself RAM. needed_bytes: planned on the fullest node with every expert in memory. problem: why it does not fit.
    settings: configuration keys and values, in order.
    """

    dense_bytes: int
    kv_bytes: int
    cache_bytes: int
    ram_tier_bytes: int
    host_bytes: int
    planned_bytes: int
    usable_bytes: int
    needed_bytes: int
    fits: bool
    resident_share: float
    settings: tuple[tuple[str, str], ...]
    problem: str | None = None


def fit(shape: ModelShape, machines: Machines, *, max_model_len: int | None = None) -> Sizing:
    """Whether a model fits, and what to set.

    Args: max_model_len: tokens of the longest sequence; default: the model's.

    >>> small = ModelShape(dense_bytes=2**30, token_bytes=2**10, expert_bytes=2**20, num_layers=4, num_experts=256,
    ...                    top_k=2, context=4096)
    >>> sizing = fit(small, Machines(nodes=1, node_bytes=4 * 2**30))
    >>> sizing.fits, sizing.resident_share, sizing.cache_bytes == small.all_experts_bytes
    (True, 1.0, True)
    >>> fit(small, Machines(nodes=1, node_bytes=2 * 2**30)).settings
    (('experts.cache', '14%'),)
    >>> fit(small, Machines(nodes=1, node_bytes=2**30)).fits
    False
    """
    length = max_model_len or shape.context
    kv = max(blocks_for(length, _BLOCK_TOKENS) * _BLOCK_TOKENS * shape.token_bytes, USUAL_BYTES)
    workers, hosts = -(-machines.workers // machines.nodes), -(-machines.hosts // machines.nodes)
    usable = int(machines.node_bytes * SHARE)
    fixed = workers * (shape.dense_bytes + kv)
    least, total = shape.top_k * shape.expert_bytes, shape.all_experts_bytes
    owners = machines.hosts or machines.workers
    here = hosts or workers  # memories of experts on the fullest node
    owned = min(total, -(-shape.num_experts // owners) * shape.num_layers * shape.expert_bytes) if hosts else total
    wanted = min(total, int(owned * (1 + _SPARE))) if hosts else total
    room = (usable - fixed - (workers * least if hosts else 0)) // here  # a worker stands in for a lost host
    fits = room >= least
    memory = max(0, min(room, wanted))
    share = min(1.0, memory / owned) if fits else 0.0
    settings = [] if max_model_len is None else [("model.max_model_len", str(max_model_len))]
    if machines.workers > 1:
        settings.append(("attention.workers", str(machines.workers)))
    if hosts:
        settings.append(("experts.hosts", str(machines.hosts)))
    if fits and memory < wanted:
        percent = f"{100 * memory // total}%"
        size = percent if 100 * memory // total * total // 100 >= least else str(memory)
        settings.append(("experts.host_cache" if hosts else "experts.cache", size))
    problem = None if fits else _problem(shape, machines, kv=kv, fixed=fixed, usable=usable, length=length)
    return Sizing(
        dense_bytes=shape.dense_bytes,
        kv_bytes=kv,
        cache_bytes=least if hosts else memory,
        ram_tier_bytes=0,
        host_bytes=memory if hosts else 0,
        planned_bytes=fixed + here * (memory if fits else least) + (workers * least if hosts else 0),
        usable_bytes=usable,
        needed_bytes=fixed + here * owned + (workers * least if hosts else 0),
        fits=fits,
        resident_share=share,
        settings=tuple(settings),
        problem=problem,
    )


def _problem(shape: ModelShape, machines: Machines, *, kv: int, fixed: int, usable: int, length: int) -> str:
    """Fact, numbers and way out."""
    least = fixed + shape.top_k * shape.expert_bytes * (-(-machines.workers // machines.nodes) + 1)
    fact = (
        f"the fullest node needs {in_gib(least)} at least (dense weights {in_gib(shape.dense_bytes)} and KV cache "
        f"{in_gib(kv)} for each worker, and one token's experts); {in_gib(usable)} of its "
        f"{in_gib(machines.node_bytes)} may be planned"
    )
    shorter = f", or lower --max-model-len (now {length} tokens)" if kv > USUAL_BYTES else ""
    return f"{fact}; give --memory {-(-int(least / SHARE) // 2**30)}GiB, or fewer --workers{shorter}"


def in_gib(num_bytes: int) -> str:
    """For people: GiB with two places, MiB below one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
