"""Statistics in Redis (or Valkey), shared by all processes of a cluster. The only file that imports redis.

Keys, for each model fingerprint F:
    moesaic:v1:F:activations   hash, field "layer:expert" -> count, changed by HINCRBY only
    moesaic:v1:F:epoch         string, a random id, set once; it is gone when the server lost its data

Additions go out as one MULTI/EXEC. A server without persistence that restarts has lost the epoch; then
every process sends all it ever sent once more, so a restart loses only the counts of processes that
ended before it. An addition whose answer is lost on the way may be counted twice: these are statistics.
"""

# redis-py declares **kwargs without types.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, cast

from cluster.errors import ConfigError
from cluster.stats.activation_counts import Counts, add_counts, copy_counts, subtract_counts

if TYPE_CHECKING:
    import redis


class RedisStore:
    """A `StateStore` behind `url`. Connects on first use and again by itself after a failure.

    Raises:
        ConfigError: `url` is not a Redis URL.
    """

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        self._client = _connect_lazily(url, timeout_s)
        kwargs = self._client.connection_pool.connection_kwargs
        host = kwargs.get("host")
        self._address = f"redis://{host}:{kwargs.get('port', 6379)}" if host else f"unix://{kwargs.get('path')}"
        self._lock = threading.Lock()
        self._epochs: dict[str, str] = {}
        self._sent: dict[str, Counts] = {}
        self._owed: dict[str, Counts] = {}

    @property
    def description(self) -> str:
        """`redis://host:port`, without user and password."""
        return self._address

    @property
    def is_shared(self) -> bool:
        """Always: that is what Redis is for."""
        return True

    def ping(self) -> None:
        """Return if the server answers, raise `ConnectionError` if not."""
        with self._translated_errors():
            self._client.ping()

    def add_activations(self, fingerprint: str, deltas: Mapping[int, Mapping[int, int]]) -> None:
        """Add counts to those of the model `fingerprint`, all or (on `ConnectionError`) none."""
        with self._lock:
            self._send(fingerprint, deltas)
            self._settle(fingerprint)

    def activations(self, fingerprint: str) -> Counts:
        """Total counts of the model `fingerprint`, from all processes."""
        with self._lock:
            self._send(fingerprint, {})  # looks at the epoch
            self._settle(fingerprint)
        with self._translated_errors():
            fields = cast("dict[bytes, bytes]", self._client.hgetall(_key(fingerprint, "activations")))
        counts: Counts = {}
        for field, count in fields.items():
            layer, expert = field.split(b":")
            counts.setdefault(int(layer), {})[int(expert)] = int(count)
        return counts

    def _settle(self, fingerprint: str) -> None:
        """Send what a restarted server lacks of ours; if that fails it stays owed."""
        if self._owed.get(fingerprint):
            with contextlib.suppress(ConnectionError):
                self._send(fingerprint, {})

    def _send(self, fingerprint: str, deltas: Mapping[int, Mapping[int, int]]) -> None:
        """Add `deltas` and what is owed in one transaction, and see whether the server still has its data."""
        owed = self._owed.get(fingerprint, {})
        total = copy_counts(deltas)
        add_counts(total, owed)
        epoch_key, counts_key = _key(fingerprint, "epoch"), _key(fingerprint, "activations")
        with self._translated_errors(), self._client.pipeline(transaction=True) as pipeline:
            pipeline.set(epoch_key, uuid.uuid4().hex, nx=True)
            pipeline.get(epoch_key)
            for layer, by_expert in total.items():
                for expert, count in by_expert.items():
                    if count:
                        pipeline.hincrby(counts_key, f"{layer}:{expert}", count)
            epoch = cast("bytes", pipeline.execute()[1]).decode()
        sent = self._sent.setdefault(fingerprint, {})
        is_same_data = self._epochs.setdefault(fingerprint, epoch) == epoch
        self._epochs[fingerprint] = epoch
        self._owed[fingerprint] = {} if is_same_data else subtract_counts(sent, owed)
        add_counts(sent, deltas)

    @contextlib.contextmanager
    def _translated_errors(self) -> Generator[None]:
        import redis

        try:
            yield
        except redis.RedisError as error:
            raise ConnectionError(f"{self._address}: {error}") from error


def _connect_lazily(url: str, timeout_s: float) -> redis.Redis:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        return redis.Redis.from_url(  # no retry inside: HINCRBY is not idempotent, and callers probe later
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise ConfigError(f"config field redis.url: {error}") from error


def _key(fingerprint: str, kind: str) -> str:
    return f"moesaic:v1:{fingerprint}:{kind}"
