"""Opens the statistics store a configuration names."""

from __future__ import annotations

from cluster.application import ApplicationId
from cluster.protocols import StateStore
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.memory_store import MemoryStore
from cluster.stats.redis_store import RedisStore


def open_store(url: str | None, application: ApplicationId) -> StateStore:
    """Redis at `url`, counting on while it is away, or this process's memory when there is none.

    Does not connect yet.
    """
    return FallbackStore(RedisStore(url, application)) if url else MemoryStore()
