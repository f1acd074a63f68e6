"""Statistics in Redis (or Valkey), shared by all processes of a cluster. Works with Redis 7.0's commands.

Keys, for each application and model fingerprint F, all beginning with moesaic:v3:NAMESPACE:APPLICATION:F: (v2 had no application, v1 no phases;
their keys are left alone)

| key | type | holds | bound |
|---|---|---|---|
| activations:P | hash | "layer:expert" -> exact count in phase P (prefill, decode), since the first worker | layers x experts |
| statistics:0, :1 | hash | decayed counts and masses by cluster of prompts (redis_statistics.py): "version" and "shape" of the clusters, and "cluster:phase:layer" -> time, then count and mass of each expert, as doubles. Clusters of version v are in v % 2, so a new version takes the place of the last but one. The cluster after the last is of prompts without one. | 2 x 2 x clusters x layers x experts x 16 bytes; a day or 16 half-lives |
| prompts | list | embeddings of the last prompts, int8 | 1024 x 64 bytes; a day |
| learned:K, learned:K:times | hash, sorted set | worker -> weight (8 bytes) and share of a kind of policy state K, and when | policy_state_shares.py; a day |
| state:N | hash | "version" and "state" of what the scheduler remembers by the name N (clusters, placement) | one a name |
| fence | string | a number that grows with every scheduler; states are taken from the last one only | |
| epoch | string | a random id, set once; it is gone when the server lost its data | |

Every addition is one script, so atomic. A server without persistence that restarts has lost the epoch; then every
process sends once more all counts (exact) and sums (faded) that it ever sent, so a restart loses only those of processes
that ended before it. An addition whose answer is lost on the way may be counted twice: these are statistics.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

from cluster.application import DEFAULT_APPLICATION, ApplicationId
from cluster.protocols import PolicyStateShare, VersionedState
from cluster.semantics.statistics import ExpertStatistics
from cluster.stats.activation_counts import Counts, Deltas
from cluster.stats.redis_connection import RedisConnection
from cluster.stats.redis_counts import RedisCounts
from cluster.stats.redis_states import RedisStates
from cluster.stats.redis_statistics import RedisStatistics


class RedisStore:
    """A `StateStore` behind `url`. Connects on first use and again by itself after a failure.

    Raises:
        ConfigError: `url` is not a Redis URL.
    """

    def __init__(self, url: str, application: ApplicationId = DEFAULT_APPLICATION, *, timeout_s: float = 2.0) -> None:
        self._connection = RedisConnection(url, timeout_s, application.key_prefix)
        self._counts = RedisCounts(self._connection)
        self._statistics = RedisStatistics(self._connection)
        self._states = RedisStates(self._connection)

    @property
    def description(self) -> str:
        """`redis://host:port`, without user and password."""
        return self._connection.address

    @property
    def is_shared(self) -> bool:
        """Always: that is what Redis is for."""
        return True

    def ping(self) -> None:
        """Return if the server answers, raise `ConnectionError` if not."""
        self._connection.ping()

    def add_activations(self, fingerprint: str, deltas: Deltas) -> None:
        """Add counts to those of the model `fingerprint`, all or (on `ConnectionError`) none."""
        self._counts.add(fingerprint, deltas)

    def activations(self, fingerprint: str) -> Counts:
        """Total counts of the model `fingerprint`, from all processes."""
        return self._counts.read(fingerprint)

    def publish_policy_state(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """Keep a worker's share; whole or (on `ConnectionError`, as far as is known) not."""
        self._states.publish_policy_state(fingerprint, name, owner, blob, weight)

    def read_policy_states(self, fingerprint: str, name: str) -> list[PolicyStateShare]:
        """Shares of all workers, the last published first."""
        return self._states.read_policy_states(fingerprint, name)

    def add_statistics(
        self, fingerprint: str, delta: ExpertStatistics, prompts: Sequence[bytes], *, half_life_s: float
    ) -> None:
        """Add activations counted just now to the server's decayed sums."""
        self._statistics.add(fingerprint, delta, prompts, half_life_s)

    def statistics(self, fingerprint: str, clusters_version: int, *, half_life_s: float) -> ExpertStatistics | None:
        """Decayed sums of all processes, by the server's clock."""
        return self._statistics.read(fingerprint, clusters_version, half_life_s)

    def recent_prompts(self, fingerprint: str) -> list[bytes]:
        """Embeddings of the last prompts of all workers, the latest first."""
        return self._statistics.recent_prompts(fingerprint)

    def take_fence(self, fingerprint: str) -> None:
        """Be the one writer of states from now on."""
        self._states.take_fence(fingerprint)

    def put_state(self, fingerprint: str, name: str, blob: bytes, version: int) -> bool:
        """Keep a state unless it is older than what is kept."""
        return self._states.put(fingerprint, name, blob, version)

    def get_state(self, fingerprint: str, name: str) -> VersionedState | None:
        """The state of the highest version."""
        return self._states.get(fingerprint, name)
