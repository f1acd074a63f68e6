"""What Serve says of its applications now, from any process and however often Serve was shut down and started since.

Serve's own client keeps the handle of the controller that it first met; after `serve shutdown` every answer of it is an
error for ever. Here the controller is looked up each time. Its names are pinned by tests/contracts/test_serve_state.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.control.presence import ServedApplication
from cluster.errors import ConfigError, Unavailable

CONTROLLER, CONTROLLER_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
_CALL_TIMEOUT_S = 5.0


def served_applications() -> Mapping[str, ServedApplication]:
    """Serve's applications by name; none where Serve does not run.

    Raises:
        Unavailable: the controller does not answer, as while it restarts: nothing is known.
    """
    controller: Any = _controller()
    if controller is None:
        return {}
    try:
        details: Any = ray.get(controller.get_serve_instance_details.remote(), timeout=_CALL_TIMEOUT_S)
    except RayError as error:
        raise Unavailable(f"Serve does not answer: {type(error).__name__}") from error
    return {name: _served(application) for name, application in details["applications"].items()}


def check_route_is_free(route_prefix: str, *, served_as: str) -> None:
    """Serve would refuse it late, and in its own words.

    Raises:
        ConfigError: another of Serve's applications answers there; says what to do.
        Unavailable: Serve does not answer.
    """
    for name, each in served_applications().items():
        if each.route_prefix == route_prefix and name != served_as and not each.is_going:
            raise ConfigError(
                f"Serve's application {name!r} answers at {route_prefix} on this Ray; deploy a second one from a Serve "
                f"config file with a route_prefix of its own, or delete {name!r} first"
            )


def controller_id() -> str:
    """Which Serve runs on this Ray: another one after `serve shutdown`; empty where none runs."""
    controller = _controller()
    return "" if controller is None else controller._actor_id.hex()


def _controller() -> ActorHandle | None:
    try:
        return ray.get_actor(CONTROLLER, namespace=CONTROLLER_NAMESPACE)
    except ValueError:
        return None


def _served(details: Mapping[str, Any]) -> ServedApplication:
    status = details["status"]  # a string's enumeration, or its value
    return ServedApplication(
        str(getattr(status, "value", status)), frozenset(details["deployments"]), details["route_prefix"] or ""
    )
