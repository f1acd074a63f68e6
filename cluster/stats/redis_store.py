"""Statistics in Redis (or Valkey), shared by all processes of a cluster. The only file that imports redis.

Keys, for each model fingerprint F, phase P (prefill, decode) and kind of learned state K:
    moesaic:v2:F:activations:P      hash, field "layer:expert" -> count, changed by HINCRBY only
    moesaic:v2:F:epoch              string, a random id, set once; it is gone when the server lost its data
    moesaic:v2:F:learned:K          hash, worker id -> weight (8 bytes) and share, as many as learned_shares.py allows
    moesaic:v2:F:learned:K:times    sorted set, worker id by time of publication
(v1 had no phases; its keys are left alone.)

Additions and reads are one script call each, with all counts in one packed argument or answer: for the 30,000
counts of a large model that costs this process 1/60 of what a pipeline of HINCRBY does, whose encoding in Python
would take a tenth of a core. A server without persistence that restarts has lost the epoch; then every process
sends all it ever sent once more, so a restart loses only the counts of processes that ended before it. An addition
whose answer is lost on the way may be counted twice: these are statistics.
"""

# redis-py declares **kwargs without types.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import contextlib
import struct
import threading
import uuid
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, cast

from cluster.errors import ConfigError
from cluster.protocols import LearnedShare
from cluster.stats.activation_counts import Counts, Deltas, add_counts, copy_counts, subtract_counts
from cluster.stats.learned_shares import MAX_SHARES, SHARE_TTL_S, check_size
from cluster.types import Phase

if TYPE_CHECKING:
    import redis

_WEIGHT = struct.Struct("<Q")
_ENTRY = struct.Struct("<HHQ")  # layer, expert, count; the scripts have the same as Lua's "<I2I2I8"

_ADD = """
redis.call('SET', KEYS[1], ARGV[1], 'NX')
for i = 2, #KEYS do
  for at = 1, #ARGV[i], 12 do
    local layer, expert, count = struct.unpack('<I2I2I8', ARGV[i], at)
    redis.call('HINCRBY', KEYS[i], layer .. ':' .. expert, string.format('%.0f', count))
  end
end
return redis.call('GET', KEYS[1])
"""

_READ = """
local packed = {}
for i, key in ipairs(KEYS) do
  local entries, fields = {}, redis.call('HGETALL', key)
  for at = 1, #fields, 2 do
    local layer, expert = string.match(fields[at], '^(%d+):(%d+)$')
    entries[#entries + 1] = struct.pack('<I2I2I8', layer, expert, tonumber(fields[at + 1]))
  end
  packed[i] = table.concat(entries)
end
return packed
"""

# KEYS: shares, times. ARGV: owner, value, most shares, seconds that they live.
_PUBLISH = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1e6
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], string.format('%.6f', now), ARGV[1])
local oldest = string.format('%.6f', now - ARGV[4])
for _, owner in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', oldest)) do
  redis.call('HDEL', KEYS[1], owner)
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', oldest)
for _, owner in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1 - ARGV[3])) do
  redis.call('HDEL', KEYS[1], owner)
end
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - ARGV[3])
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, ARGV[4] * 1000) end
"""


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
        self._add = self._client.register_script(_ADD)
        self._read = self._client.register_script(_READ)
        self._publish = self._client.register_script(_PUBLISH)
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

    def add_activations(self, fingerprint: str, deltas: Deltas) -> None:
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
            packed = cast("list[bytes]", self._read(keys=[_activations_key(fingerprint, phase) for phase in Phase]))
        return {phase: rows for phase, entries in zip(Phase, packed, strict=True) if (rows := _unpacked(entries))}

    def publish_learned(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """Keep a worker's share; whole or (on `ConnectionError`, as far as is known) not."""
        check_size(name, blob)
        keys = _learned_keys(fingerprint, name)
        with self._translated_errors():
            self._publish(keys=keys, args=[owner, _WEIGHT.pack(weight) + blob, MAX_SHARES, int(SHARE_TTL_S)])

    def read_learned(self, fingerprint: str, name: str) -> list[LearnedShare]:
        """Shares of all workers, the last published first."""
        shares, times = _learned_keys(fingerprint, name)
        with self._translated_errors(), self._client.pipeline(transaction=True) as both:
            both.zrevrange(times, 0, -1)
            both.hgetall(shares)
            owners, values = cast("tuple[list[bytes], dict[bytes, bytes]]", both.execute())
        found = [(owner, values[owner]) for owner in owners if owner in values]
        return [
            LearnedShare(owner.decode(), _WEIGHT.unpack_from(value)[0], value[_WEIGHT.size :]) for owner, value in found
        ]

    def _settle(self, fingerprint: str) -> None:
        """Send what a restarted server lacks of ours; if that fails it stays owed."""
        if self._owed.get(fingerprint):
            with contextlib.suppress(ConnectionError):
                self._send(fingerprint, {})

    def _send(self, fingerprint: str, deltas: Deltas) -> None:
        """Add `deltas` and what is owed at once, and see whether the server still has its data."""
        owed = self._owed.get(fingerprint, {})
        total = copy_counts(deltas)
        add_counts(total, owed)
        with self._translated_errors():
            answer = self._add(
                keys=[_key(fingerprint, "epoch"), *(_activations_key(fingerprint, phase) for phase in total)],
                args=[uuid.uuid4().hex, *(_packed(rows.items()) for rows in total.values())],
            )
        epoch = cast("bytes", answer).decode()
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


def _packed(rows: Iterable[tuple[int, dict[int, int]]]) -> bytes:
    return b"".join(_ENTRY.pack(layer, expert, count) for layer, row in rows for expert, count in row.items() if count)


def _unpacked(entries: bytes) -> dict[int, dict[int, int]]:
    rows: dict[int, dict[int, int]] = {}
    for layer, expert, count in _ENTRY.iter_unpack(entries):
        rows.setdefault(layer, {})[expert] = count
    return rows


def _learned_keys(fingerprint: str, name: str) -> list[str]:
    return [_key(fingerprint, f"learned:{name}"), _key(fingerprint, f"learned:{name}:times")]


def _activations_key(fingerprint: str, phase: Phase) -> str:
    return _key(fingerprint, f"activations:{phase}")


def _key(fingerprint: str, kind: str) -> str:
    return f"moesaic:v2:{fingerprint}:{kind}"
