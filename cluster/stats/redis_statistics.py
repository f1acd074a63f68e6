"""Decayed statistics and recent prompts in Redis. Knows scripts and packing; the keys are in redis_store.py.

A row, the E experts of one (cluster, phase, layer), is one field of a hash: the time it is as of, then count and mass
of each expert, as doubles. To add to it is to read, fade, add and write it, on the server and by the server's clock,
so that workers need not agree on the time, and however many add at once nothing is lost. That is forward decay
(Cormode et al. 2009) with a landmark for each row, which is never far away. Rows without news are not touched.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from cluster.semantics.statistics import ExpertStatistics, no_statistics
from cluster.stats.decayed_totals import NUM_VERSIONS, DecayedTotals
from cluster.stats.recent_prompts import MAX_PROMPTS, PROMPTS_TTL_S, checked_prompts
from cluster.stats.redis_connection import RedisConnection

_LOG = logging.getLogger(__name__)
_MIN_TTL_S = 86_400.0
_TTL_HALF_LIVES = 16.0

# KEYS: a version's rows, epoch, prompts. ARGV: an epoch if there is none; version, its shape, half-life, seconds to
# live; numbers in a row, names of rows, rows; most prompts, seconds that they live, prompts.
_ADD = """
redis.call('SET', KEYS[2], ARGV[1], 'NX')
local answer = {redis.call('GET', KEYS[2]), ARGV[3]}
if #ARGV > 10 then
  redis.call('LPUSH', KEYS[3], unpack(ARGV, 11))
  redis.call('LTRIM', KEYS[3], 0, ARGV[9] - 1)
  redis.call('PEXPIRE', KEYS[3], ARGV[10] * 1000)
end
local kept = tonumber(redis.call('HGET', KEYS[1], 'version') or '-1')
if kept > tonumber(ARGV[2]) then return answer end
if kept < tonumber(ARGV[2]) then
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'version', ARGV[2], 'shape', ARGV[3])
end
answer[2] = redis.call('HGET', KEYS[1], 'shape')
if answer[2] ~= ARGV[3] then return answer end

local clock = redis.call('TIME')
local now, half_life, width = clock[1] + clock[2] / 1e6, tonumber(ARGV[4]), tonumber(ARGV[6])
local at, chunk = 1, 256  -- the stack of Lua takes some thousands of values
for name in string.gmatch(ARGV[7], '%S+') do
  local row, factor = redis.call('HGET', KEYS[1], name), 0
  if row then factor = 0.5 ^ (math.max(now - struct.unpack('<d', row), 0) / half_life) end
  local parts = {struct.pack('<d', now)}
  for first = 0, width - 1, chunk do
    local size = math.min(chunk, width - first)
    local sums = {struct.unpack('<' .. string.rep('f', size), ARGV[8], at + 4 * first)}
    local doubles = '<' .. string.rep('d', size)
    if row then
      local old = {struct.unpack(doubles, row, 9 + 8 * first)}
      for i = 1, size do
        local kept = factor * old[i]
        if kept - kept ~= 0 then kept = 0 end  -- not finite: it would stay so for ever
        sums[i] = sums[i] + kept
      end
    end
    parts[#parts + 1] = struct.pack(doubles, unpack(sums, 1, size))
  end
  redis.call('HSET', KEYS[1], name, table.concat(parts))
  at = at + 4 * width
end
redis.call('PEXPIRE', KEYS[1], ARGV[5] * 1000)
return answer
"""

# KEYS: a version's rows, epoch. ARGV: an epoch if there is none.
_READ = """
redis.call('SET', KEYS[2], ARGV[1], 'NX')
local clock = redis.call('TIME')
return {redis.call('GET', KEYS[2]), string.format('%.6f', clock[1] + clock[2] / 1e6), redis.call('HGETALL', KEYS[1])}
"""

_RECENT = "return redis.call('LRANGE', KEYS[1], 0, -1)"


class RedisStatistics:
    """The part of RedisStore for `add_statistics`, `statistics` and `recent_prompts`.

    Keeps what this process added, faded as the server fades it, and adds it again to a server that has lost its data.
    """

    def __init__(self, connection: RedisConnection, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key = connection.key
        self._add = connection.script(_ADD)
        self._read = connection.script(_READ)
        self._recent = connection.script(_RECENT)
        self._lock = threading.Lock()
        self._epochs: dict[str, bytes] = {}
        self._mine: dict[str, DecayedTotals] = {}
        self._owed: dict[str, list[ExpertStatistics]] = {}

    def add(self, fingerprint: str, delta: ExpertStatistics, prompts: Sequence[bytes], half_life_s: float) -> None:
        """StateStore.add_statistics."""
        checked = checked_prompts(prompts)
        delta.check_finite()
        with self._lock:
            mine = self._mine.setdefault(fingerprint, DecayedTotals())
            if self._send(fingerprint, delta, checked, half_life_s):
                self._owed[fingerprint] = mine.read_all(half_life_s=half_life_s, now_s=self._clock())
            mine.add(delta, half_life_s=half_life_s, now_s=self._clock())
            self._settle(fingerprint, half_life_s)

    def read(self, fingerprint: str, clusters_version: int, half_life_s: float) -> ExpertStatistics | None:
        """StateStore.statistics."""
        keys = [self._rows_key(fingerprint, clusters_version), self._key(fingerprint, "epoch")]
        with self._lock:
            epoch, now_s, values = self._read_rows(keys)
            if self._is_news(fingerprint, epoch) and (mine := self._mine.get(fingerprint)) is not None:
                self._owed[fingerprint] = mine.read_all(half_life_s=half_life_s, now_s=self._clock())
                self._settle(fingerprint, half_life_s)
                _, now_s, values = self._read_rows(keys)
        if int(values.pop(b"version", b"-1")) != clusters_version:
            return None
        return _unpacked(clusters_version, values, now_s, half_life_s)

    def recent_prompts(self, fingerprint: str) -> list[bytes]:
        """StateStore.recent_prompts."""
        return cast("list[bytes]", self._recent([self._key(fingerprint, "prompts")]))

    def _read_rows(self, keys: Sequence[str]) -> tuple[bytes, float, dict[bytes, bytes]]:
        """Epoch, the server's time, and the fields of the hash."""
        epoch, now, fields = cast("tuple[bytes, bytes, list[bytes]]", self._read(keys, [uuid.uuid4().hex]))
        return epoch, float(now), dict(zip(fields[::2], fields[1::2], strict=True))

    def _settle(self, fingerprint: str, half_life_s: float) -> None:
        """Send what a restarted server lacks of ours; what fails stays owed."""
        owed = self._owed.get(fingerprint, [])
        while owed:
            try:
                is_lost = self._send(fingerprint, owed[0], (), half_life_s)
            except ConnectionError:
                return
            sent = owed.pop(0)
            if is_lost:  # again: all but what was just sent
                everything = self._mine[fingerprint].read_all(half_life_s=half_life_s, now_s=self._clock())
                owed[:] = [part for part in everything if part.clusters_version != sent.clusters_version]

    def _send(self, fingerprint: str, delta: ExpertStatistics, prompts: Sequence[bytes], half_life_s: float) -> bool:
        """Add to the server's sums; whether it had lost those there were before."""
        shape = f"{delta.num_clusters} {delta.num_experts} {','.join(map(str, delta.layers))}"
        chosen = np.argwhere(delta.values.any(axis=(3, 4)))
        names = " ".join([f"{cluster}:{phase}:{layer}" for cluster, phase, layer in chosen.tolist()])
        rows = delta.values[tuple(chosen.T)].astype("<f4").tobytes()
        ttl_s = max(_MIN_TTL_S, _TTL_HALF_LIVES * half_life_s)
        keys = [
            self._rows_key(fingerprint, delta.clusters_version),
            *(self._key(fingerprint, k) for k in ("epoch", "prompts")),
        ]
        epoch, kept = cast(
            "list[bytes]",
            self._add(
                keys,
                [
                    *(uuid.uuid4().hex, delta.clusters_version, shape, half_life_s, int(ttl_s)),
                    *(2 * delta.num_experts, names, rows, MAX_PROMPTS, int(PROMPTS_TTL_S)),
                    *prompts,
                ],
            ),
        )
        if kept.decode() != shape:
            raise ValueError(f"statistics of shape {shape}; version {delta.clusters_version} has {kept.decode()}")
        return self._is_news(fingerprint, epoch)

    def _is_news(self, fingerprint: str, epoch: bytes) -> bool:
        """Whether the server has lost the data that this process saw there."""
        known = self._epochs.get(fingerprint, epoch)
        self._epochs[fingerprint] = epoch
        return known != epoch

    def _rows_key(self, fingerprint: str, clusters_version: int) -> str:
        return self._key(fingerprint, f"statistics:{clusters_version % NUM_VERSIONS}")


def _unpacked(clusters_version: int, values: dict[bytes, bytes], now_s: float, half_life_s: float) -> ExpertStatistics:
    num_clusters, num_experts, layers = values.pop(b"shape").decode().split(" ")
    numbers = [int(layer) for layer in layers.split(",")]
    statistics = no_statistics(clusters_version, int(num_clusters), numbers, int(num_experts))
    for name, row in values.items():
        cluster, phase, layer = map(int, name.split(b":"))
        sums = np.frombuffer(row, dtype="<f8")
        if not np.isfinite(sums).all():  # from somebody else: what cannot be a count counts nothing
            _LOG.warning("statistics that are not finite were left out: row %s", name.decode(errors="replace"))
            continue
        fading = 0.5 ** (max(now_s - float(sums[0]), 0.0) / half_life_s)
        statistics.values[cluster, phase, layer] = sums[1:].reshape(-1, 2) * fading
    return statistics
