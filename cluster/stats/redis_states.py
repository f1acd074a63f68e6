"""What one writer leaves for others in Redis: shares of what was learned, states.

Knows scripts; the keys are in redis_store.py.
"""

from __future__ import annotations

import struct
from typing import cast

from cluster.errors import Superseded
from cluster.protocols import PolicyStateShare, VersionedState
from cluster.stats.policy_state_shares import MAX_SHARES, SHARE_TTL_S, check_size
from cluster.stats.redis_connection import RedisConnection

_WEIGHT = struct.Struct("<Q")

# KEYS: entries, times. ARGV: owner, value, most entries, seconds that they live.
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

# KEYS: entries, times. ARGV: seconds that entries live. The last published first.
_PUBLISHED = """
local clock = redis.call('TIME')
local oldest = string.format('(%.6f', clock[1] + clock[2] / 1e6 - ARGV[1])
local found = {}
for _, owner in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[2], '+inf', oldest)) do
  local value = redis.call('HGET', KEYS[1], owner)
  if value then
    found[#found + 1] = owner
    found[#found + 1] = value
  end
end
return found
"""

# KEYS: fence. A clock's milliseconds where they are more: a server that has lost its data hands out no number twice.
_TAKE = """
local clock = redis.call('TIME')
local fence = math.max(tonumber(redis.call('GET', KEYS[1]) or 0) + 1, clock[1] * 1000 + math.floor(clock[2] / 1000))
redis.call('SET', KEYS[1], string.format('%.0f', fence))
return string.format('%.0f', fence)
"""

_SUPERSEDED = -1

# KEYS: state, fence. ARGV: version, state, the writer's fence.
_PUT = """
local fence = tonumber(redis.call('GET', KEYS[2]) or 0)
if fence > tonumber(ARGV[3]) then return -1 end
if fence < tonumber(ARGV[3]) then redis.call('SET', KEYS[2], ARGV[3]) end
local kept = redis.call('HGET', KEYS[1], 'version')
if kept and tonumber(kept) >= tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'state', ARGV[2])
return 1
"""

_GET = "return redis.call('HMGET', KEYS[1], 'version', 'state')"


class RedisStates:
    """The part of RedisStore for `publish_policy_state`, `read_policy_states` and the states."""

    def __init__(self, connection: RedisConnection) -> None:
        self._key = connection.key
        self._fences: dict[str, int] = {}
        self._take = connection.script(_TAKE)
        self._publish = connection.script(_PUBLISH)
        self._published = connection.script(_PUBLISHED)
        self._put = connection.script(_PUT)
        self._get = connection.script(_GET)

    def publish_policy_state(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """StateStore.publish_policy_state."""
        check_size(name, blob)
        value = _WEIGHT.pack(weight) + blob
        self._publish(self._share_keys(fingerprint, name), [owner, value, MAX_SHARES, int(SHARE_TTL_S)])

    def read_policy_states(self, fingerprint: str, name: str) -> list[PolicyStateShare]:
        """StateStore.read_policy_states."""
        found = cast("list[bytes]", self._published(self._share_keys(fingerprint, name), [int(SHARE_TTL_S)]))
        return [
            PolicyStateShare(owner.decode(), _WEIGHT.unpack_from(value)[0], value[_WEIGHT.size :])
            for owner, value in zip(found[::2], found[1::2], strict=True)
        ]

    def take_fence(self, fingerprint: str) -> None:
        """StateStore.take_fence."""
        self._fences[fingerprint] = int(self._take([self._key(fingerprint, "fence")]))

    def put(self, fingerprint: str, name: str, blob: bytes, version: int) -> bool:
        """StateStore.put_state."""
        keys, fence = [self._key(fingerprint, f"state:{name}"), self._key(fingerprint, "fence")], self._fences
        taken = int(self._put(keys, [version, blob, fence.get(fingerprint, 0)]))
        if taken == _SUPERSEDED:
            raise Superseded(
                "another scheduler of this application writes to the store now; if it is another cluster's, "
                "give one of them a ray.application of its own"
            )
        return bool(taken)

    def get(self, fingerprint: str, name: str) -> VersionedState | None:
        """StateStore.get_state."""
        version, blob = cast("list[bytes | None]", self._get([self._key(fingerprint, f"state:{name}")]))
        return None if version is None or blob is None else VersionedState(int(version), blob)

    def _share_keys(self, fingerprint: str, name: str) -> list[str]:
        return [self._key(fingerprint, f"learned:{name}"), self._key(fingerprint, f"learned:{name}:times")]
