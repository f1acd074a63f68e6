"""The cluster's embedded Valkey: a detached Ray actor with the server program. Imports no Serve: it starts sooner."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster.stats.embedded_valkey import EmbeddedValkey, start_embedded_valkey

VALKEY_ACTOR = "moesaic-valkey"


class ValkeyHolder:
    """Keeps the embedded Valkey: its child process ends with this actor."""

    def __init__(self) -> None:
        self._data = tempfile.TemporaryDirectory(prefix="moesaic-valkey-")
        address = ray.util.get_node_ip_address()  # workers of other nodes must reach it, too
        self._server: EmbeddedValkey = start_embedded_valkey(Path(self._data.name), host=address)

    def url(self) -> str:
        """Where it listens."""
        return self._server.url

    def stop(self) -> None:
        """End the server."""
        self._server.stop()
        self._data.cleanup()


def start_valkey_actor(namespace: str) -> ray.ObjectRef:
    """URL-to-be of the cluster's embedded Valkey, started if there is none yet; returns at once."""
    actor_class: Any = ray.remote(ValkeyHolder)
    actor = actor_class.options(
        name=VALKEY_ACTOR, namespace=namespace, lifetime="detached", get_if_exists=True, num_cpus=0
    )
    return actor.remote().url.remote()


def valkey_url(namespace: str) -> str:
    """URL of the cluster's embedded Valkey, started if there is none yet.

    Raises:
        ConnectionError: there is no server program, or it does not start.
    """
    try:
        return ray.get(start_valkey_actor(namespace), timeout=60)
    except (RayActorError, RayTaskError, GetTimeoutError) as error:
        raise ConnectionError(f"the embedded Valkey did not start: {error}") from error


def stop_valkey_actor(namespace: str) -> None:
    """End the embedded Valkey of this cluster, if there is one."""
    try:
        holder = ray.get_actor(VALKEY_ACTOR, namespace=namespace)
    except ValueError:
        return
    ray.get(holder.stop.remote(), timeout=10)
    ray.kill(holder)
