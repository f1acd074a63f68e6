"""Starts and stops Ray and Ray Serve, and talks to the running application: Ray's side of `moesaic serve`.

Knows Ray's life cycle calls and options; knows nothing of models or configuration.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from actors.ray_shells.gateway_actors import Gateways
from actors.ray_shells.named_actors import end_application
from actors.ray_shells.serve_failures import first_line, reason_of
from actors.ray_shells.serve_state import check_route_is_free
from actors.ray_shells.valkey_actor import start_valkey_actor
from cluster.application import ApplicationId
from cluster.errors import ConfigError, Unavailable
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus

_OBJECT_STORE_BYTES = 256 * 2**20  # experts do not travel through it on one machine
_CALL_TIMEOUT_S = 30.0
_ROUTE = "/"
_SPARE_TIMEOUT_S = 30.0  # our own deadline must come before Serve's


class RayRuntime:
    """A Ray cluster, joined or started; ends only what it started."""

    def __init__(self, *, address: str | None, application: ApplicationId, environment: Mapping[str, str]) -> None:
        """Args: environment: of every process of a Ray that is started here; a joined one has its own."""
        self._application = application
        self._started_ray = address is None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets every other program preempt the engine
        os.environ.update(environment)
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # Ray's 30 are short where the disk is slow
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        options: dict[str, Any] = {
            "namespace": application.namespace,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        if address is None:
            _make_token()
            # "local": without it, Ray joins a cluster that it finds on this machine
            options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        self._directory = Path(tempfile.mkdtemp(prefix="moesaic-serve-"))
        try:
            with _working_in(self._directory):
                ray.init(address=address or "local", **options)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            self._directory.rmdir()
            if address is None:
                raise Unavailable(f"Ray does not start here: {first_line(error)}") from error
            raise ConfigError(
                f"config field ray.address: cannot join Ray at {address}: {first_line(error)}; give the address of a "
                f"running cluster (ray start --head prints it), or leave it out for a Ray of our own"
            ) from error

    def start_valkey(self) -> None:
        """Begin to start the cluster's embedded Valkey; does not wait for it."""
        start_valkey_actor(self._application)

    def start_serve(self, *, host: str, port: int, request_timeout_s: float) -> None:
        """Start Serve's controller, and an HTTP proxy on each node that has a replica."""
        timeout_s = request_timeout_s + _SPARE_TIMEOUT_S
        serve.start(
            proxy_location="EveryNode", http_options={"host": host, "port": port, "request_timeout_s": timeout_s}
        )

    def check_route(self, *, name: str) -> None:
        """Raises: ConfigError: another application answers where the application `name` would."""
        check_route_is_free(_ROUTE, served_as=name)

    def run(self, application: Application, *, name: str) -> RunningApplication:
        """Deploy and return when every replica exists (its model may still be loading)."""
        try:
            handle = serve.run(application, name=name, route_prefix=_ROUTE)
        except RuntimeError as error:  # all that Serve makes of an error in a replica
            raise ConfigError(reason_of(str(error)) or f"the application does not start: {error}") from error
        return RunningApplication(name, handle, Gateways(self._application))

    def stop(self, application: str, *, num_hosts: int = 0) -> None:
        """Take the application down, then what was started here; tolerates what is gone already."""
        # Ray prints what its own parts say of each other's end, and that it will be tried again for ever.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._stop(application)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _stop(self, application: str) -> None:
        with contextlib.suppress(RayServeException, RayError):
            serve.delete(application)
        with contextlib.suppress(RayError):
            end_application(self._application)
        if self._started_ray:
            with contextlib.suppress(RayServeException, RayError):
                serve.shutdown()
            ray.shutdown()


@contextlib.contextmanager
def _working_in(directory: Path) -> Generator[None]:
    """Ray puts the working directory before everything on the import path of all workers: modules of the user's there
    (redis.py, types.py) would stand in for ours. An empty one has none."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def _make_token() -> None:
    """A token for a Ray of our own, which only its processes know.

    Ray would leave one in the user's home for good, and by it the next `ray start` there would ask everybody for it.
    """
    has_one = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not has_one and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # the mode is left to Ray, which has read it already


class RunningApplication:
    """The front ends of a deployed application, for whoever started it."""

    def __init__(self, name: str, handle: DeploymentHandle, gateways: Gateways) -> None:
        self.name = name
        self._handle = handle
        self._gateways = gateways

    def failure(self) -> str | None:
        """Why a replica did not start, as far as it has said so to Serve."""
        application = serve.status().applications.get(self.name)
        deployments = () if application is None else application.deployments.values()
        return next((reason for each in deployments if (reason := reason_of(each.message))), None)

    def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        """The attention workers' status."""
        return self._handle.worker_statuses.remote().result(timeout_s=_CALL_TIMEOUT_S)

    def host_statuses(self) -> tuple[ExpertHostStatus, ...]:
        """The expert hosts' status."""
        return self._handle.host_statuses.remote().result(timeout_s=_CALL_TIMEOUT_S)

    def grpc_addresses(self) -> list[str]:
        """Where the gRPC gateways listen; waits until they do.

        Raises:
            ConfigError: one cannot, and why.
        """
        return self._gateways.addresses()

    def begin_drain(self) -> None:
        """Refuse new requests from now on."""
        self._gateways.begin_drain()
        self._ask_all("begin_drain")

    def num_in_flight(self) -> int:
        """Requests still being answered."""
        return sum(self._ask_all("num_in_flight")) + self._gateways.num_in_flight()

    def _ask_all(self, method: str) -> list[Any]:
        """What each HTTP front end answers; one that does not lets nobody in."""
        try:
            answers = self._handle.broadcast(method).results(timeout_s=_CALL_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, RayError, DeploymentUnavailableError):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]
