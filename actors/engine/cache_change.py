"""Changes a running worker's expert memory: what is asked for is checked against the model and the node's memory."""

from __future__ import annotations

from actors.engine.loaded_engine import LoadedEngine
from actors.experts.memory.store import ExpertStore
from cluster.config.sizes import parse_cache_size
from cluster.errors import ConfigError, InvalidRequest, NothingToChange
from cluster.node_memory.leases import MemoryLease

_FIELD = "experts.cache"


def change_cache(parts: LoadedEngine, setting: str) -> None:
    """Give the worker's own expert memory another budget, and promise it. Args: setting: bytes or percent.

    Raises:
        InvalidRequest: no size, too little for one token, or more than fits; names the least or the largest.
        NothingToChange: this worker has no experts of its own.
    """
    if parts.backend is None:
        raise NothingToChange(
            "this server's workers keep no experts: their expert hosts do, by experts.host_cache; restart with "
            "experts.cache to give workers a memory of their own"
        )
    store = parts.backend.store
    largest = largest_cache(store, parts.lease)
    try:
        budget_bytes = parse_cache_size(setting, total_bytes=store.model_bytes)
    except ValueError as error:
        raise InvalidRequest(f"{error}; {_most(largest, store)}", param="cache") from error
    if budget_bytes > largest:
        raise InvalidRequest(f"{setting} is {budget_bytes} bytes; {_most(largest, store)}", param="cache")
    try:
        store.set_budget(budget_bytes)
    except ConfigError as error:  # here it is the client's mistake
        raise InvalidRequest(error.message, param="cache") from error
    parts.lease.book(_FIELD, budget_bytes)


def largest_cache(store: ExpertStore, lease: MemoryLease) -> int:
    """Bytes that fit: all experts, or as much as the node has for this process; what it has now always fits."""
    return min(store.model_bytes, max(lease.room_for(_FIELD), store.budget_bytes))


def _most(largest: int, store: ExpertStore) -> str:
    why = "all experts" if largest == store.model_bytes else "as much as this node's memory has room for"
    return f"the largest that fits is {largest} bytes ({100 * largest / store.model_bytes:.1f}%, {why})"
