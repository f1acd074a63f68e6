"""Ray's side of the gRPC gateways: one actor on each node that has a Serve proxy, started, found, asked and ended here.

They are named, detached and restarted by Ray. A gateway ends itself when the application is gone, so that one that was
started from a bare Serve file does not outlive it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.deployments import WORKER_DEPLOYMENT
from cluster.errors import MoesaicError, Unavailable

_NAME_PREFIX = "moesaic-grpc-"
_HEAD_RESOURCE = "node:__internal_head__"
_CALL_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0


class Gateways:
    """The gRPC gateways of one cluster."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def start(self, gateway: type, config_tree: dict[str, Any]) -> None:
        """Start the gateways of a configuration, and end those of another one; returns at once.

        Args:
            gateway: class of the actor; made with `config_tree`.
        """
        for actor in self._actors():
            if not _is_configured_by(actor, config_tree):
                ray.kill(actor)
        self.start_missing(gateway, config_tree)

    def start_missing(self, gateway: type, config_tree: dict[str, Any]) -> None:
        """Start a gateway on each node that should have one and has none."""
        actor_class: Any = ray.remote(gateway)
        for node_id in proxy_nodes():
            actor_class.options(
                name=f"{_NAME_PREFIX}{node_id}",
                namespace=self._namespace,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                # Not soft: on another node it would be in the way of that node's own.
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(config_tree)

    def addresses(self) -> list[str]:
        """Where they listen, once all do.

        Raises:
            ConfigError: one cannot listen, and why. Unavailable: one does not start in time.
        """
        answers = self._ask("address", timeout_s=_START_TIMEOUT_S)
        for answer in answers:
            if isinstance(answer, RayTaskError):
                raise answer.cause if isinstance(answer.cause, MoesaicError) else MoesaicError(str(answer)) from answer
            if isinstance(answer, RayError):
                raise Unavailable(f"a gRPC gateway does not start: {type(answer).__name__}") from answer
        return [str(answer) for answer in answers]

    def abort_answers(self, names: tuple[str, ...]) -> list[frozenset[str] | RayError]:
        """What each ended of the answers of those names, or the error of one that did not say in time."""
        return self._ask("abort_answers", names)

    def begin_drain(self) -> None:
        """Show NOT_SERVING, then refuse new requests; one that is gone lets nobody in."""
        self._ask("begin_drain")

    def num_in_flight(self) -> int:
        """Requests still being answered by gateways that answer."""
        return sum(answer for answer in self._ask("num_in_flight") if isinstance(answer, int))

    def stop(self) -> None:
        """End them; call when the application is gone, or they start each other again."""
        self._ask("stop")
        for actor in self._actors():
            ray.kill(actor)

    def _actors(self) -> Iterable[ActorHandle]:
        entries: Any = ray.util.list_named_actors(all_namespaces=True)
        for entry in entries:
            if entry["namespace"] == self._namespace and entry["name"].startswith(_NAME_PREFIX):
                with contextlib.suppress(ValueError):  # ended meanwhile
                    yield ray.get_actor(entry["name"], namespace=self._namespace)

    def _ask(self, method: str, *args: object, timeout_s: float = _CALL_TIMEOUT_S) -> list[Any]:
        """What each answered, or the RayError of one that did not in time."""
        return [_result(call, timeout_s) for call in [getattr(actor, method).remote(*args) for actor in self._actors()]]


def proxy_nodes() -> list[str]:
    """Ids of the nodes that take requests: those with a Serve proxy now, and the head, whose proxy may be starting."""
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD_RESOURCE in node["Resources"]]
    return list(dict.fromkeys([*heads, *serve.status().proxies]))


def find_workers() -> DeploymentHandle[Any] | None:
    """The attention workers of the application that runs on this cluster, or None if there is none (yet)."""
    for name, application in serve.status().applications.items():
        if WORKER_DEPLOYMENT in application.deployments:
            return serve.get_deployment_handle(WORKER_DEPLOYMENT, name)
    return None


def reachable_host(host: str) -> str:
    """Where clients find what listens on `host` of this node."""
    return str(ray.util.get_node_ip_address()) if host in ("0.0.0.0", "::") else host


def end_this_actor() -> None:
    """End the actor that this is called in, for good."""
    ray.kill(ray.get_runtime_context().current_actor)


def _is_configured_by(actor: ActorHandle, config_tree: dict[str, Any]) -> bool:
    try:
        return bool(ray.get(actor.is_configured_by.remote(config_tree), timeout=_CALL_TIMEOUT_S))
    except GetTimeoutError:
        return True  # busy starting
    except RayError:
        return False


def _result(call: ray.ObjectRef, timeout_s: float) -> Any:
    try:
        return ray.get(call, timeout=timeout_s)
    except RayError as error:
        return error
