"""Ray's side of the gRPC gateways: one actor on each node that has a Serve proxy, started, found, asked and ended here.

They end with the application: its scheduler sees to that, and each for itself when there is no scheduler either.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.ray_shells.named_actors import ActorKind, DetachedActors, named_actors
from actors.ray_shells.serve_state import controller_id
from cluster.application import ApplicationId
from cluster.config.sections import GrpcConfig
from cluster.control.presence import WORKER_DEPLOYMENT
from cluster.deployed_spec import DeployedSpec
from cluster.errors import ConfigError, MoesaicError, Unavailable
from cluster.network.addresses import listens_everywhere

_HEAD_RESOURCE = "node:__internal_head__"
_CALL_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0


class Gateways:
    """The gRPC gateways of one application; their keys are the ids of their nodes."""

    def __init__(self, application: ApplicationId) -> None:
        self._actors = DetachedActors(application, ActorKind.GATEWAY)

    def start(self, gateway: type, spec: DeployedSpec) -> None:
        """Start the gateways of a deployment, and end those of another one; returns at once.

        Args:
            gateway: class of the actor; made with `spec`.
        """
        self._actors.keep_only(dict.fromkeys(self._actors.list_keys(), _digest(spec)))
        for node_id in proxy_nodes():
            self._start_on(node_id, gateway, spec)

    def start_missing(self, gateway: type, spec: DeployedSpec) -> None:
        """Start a gateway on each node that should have one and has none. One of another deployment is let be."""
        there = self._actors.list_keys()
        for node_id in proxy_nodes():
            if node_id not in there:
                self._start_on(node_id, gateway, spec)

    def _start_on(self, node_id: str, gateway: type, spec: DeployedSpec) -> None:
        # Not soft: on another node it would be in the way of that node's own.
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        self._actors.start(gateway, node_id, _digest(spec), spec, scheduling_strategy=here)

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
        self._actors.end()

    def check_port(self, grpc: GrpcConfig) -> None:
        """Call before anything is started.

        Raises:
            ConfigError: another application's gateways listen on the same port; says what to set.
        """
        calls: dict[ray.ObjectRef, ApplicationId] = {}
        for application, name in named_actors():
            if name.kind == ActorKind.GATEWAY and application != self._actors.application:
                with contextlib.suppress(ValueError):
                    actor: Any = DetachedActors(application, ActorKind.GATEWAY).find(name.key)
                    calls[actor.port.remote()] = application
        # One that does not answer in time starts, or is on its way out; the port itself says no to the second.
        ready = ray.wait(list(calls), num_returns=len(calls), timeout=_CALL_TIMEOUT_S)[0] if calls else []
        for call in ready:
            if _result(call, _CALL_TIMEOUT_S) == grpc.port:
                raise ConfigError(
                    f"grpc.port {grpc.port} is that of application {calls[call]} on this Ray; "
                    "give this deployment a grpc.port of its own, or set grpc.enabled: false"
                )

    def _ask(self, method: str, *args: object, timeout_s: float = _CALL_TIMEOUT_S) -> list[Any]:
        """What each answered, or the RayError of one that did not in time."""
        actors = [actor for _, actor in self._actors.find_all()]
        return [_result(call, timeout_s) for call in [getattr(actor, method).remote(*args) for actor in actors]]


def proxy_nodes() -> list[str]:
    """Ids of the nodes that take requests: those with a Serve proxy now, and the head, whose proxy may be starting."""
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD_RESOURCE in node["Resources"]]
    return list(dict.fromkeys([*heads, *serve.status().proxies]))


def workers_of(served_as: str) -> DeploymentHandle[Any]:
    """The attention workers of one of Serve's applications."""
    return serve.get_deployment_handle(WORKER_DEPLOYMENT, served_as)


def reachable_host(host: str) -> str:
    """Where clients find what listens on `host` of this node."""
    return str(ray.util.get_node_ip_address()) if listens_everywhere(host) else host


def end_this_actor() -> None:
    """End the actor that this is called in, for good."""
    ray.kill(ray.get_runtime_context().current_actor)


def restart_this_actor() -> None:
    """End this process; Ray makes the actor again."""
    os._exit(1)


def _digest(spec: DeployedSpec) -> str:
    """Of all that a gateway reads, and of the Serve it was made for: its handles are worth nothing in another one."""
    return spec.digest("attention", "experts", "frontend", "grpc", texts=True, place=controller_id())


def _result(call: ray.ObjectRef, timeout_s: float) -> Any:
    try:
        return ray.get(call, timeout=timeout_s)
    except RayError as error:
        return error
