"""The composition root: configuration -> actors -> Serve application. Knows every concrete class.

`moesaic serve` is `serve.run(build(config))` on a local Ray; a bare Serve config file with
`import_path: cluster.app:build` and the same tree under `args` starts the same system.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from cluster.config.check import check_possible
from cluster.config.load import (
    MoesaicConfig,
    from_tree,
    load_config,
    take_secrets_from,
    to_tree,
    with_absolute_paths,
    with_overrides,
)
from cluster.deployed_spec import specify
from cluster.errors import ConfigError, MoesaicError, Unavailable
from cluster.logs import log_event
from cluster.model.info import read_model_info
from cluster.model.kv_budget import SHARE, plan_kv, value_bytes, values_per_token
from cluster.network.addresses import join_address, local_host
from cluster.process_environment import settle_environment
from cluster.stats.redis_connection import check_redis
from cluster.types import StartupPhase

if TYPE_CHECKING:
    from ray.serve import Application

    from actors.ray_shells.runtime import RunningApplication
    from cluster.frontend.generation.service import GenerationService

_LOG = logging.getLogger(__name__)
_START_TIMEOUT_S = 3600.0
_POLL_S = 0.1


def build(args: dict[str, Any] | MoesaicConfig | None = None) -> Application:
    """The Serve application of a configuration; starts shared actors idempotently. For whom Serve tells no more.

    Args:
        args: a configuration, its plain tree (Serve's `args:`), or nothing for defaults and environment.
    Raises:
        ConfigError: unknown keys, values out of range, or what cannot work together; names the fields. Another
            deployment has the name of this application or its gRPC port; says what to set.
    """
    config = args if isinstance(args, MoesaicConfig) else settle_length(_merged(args or {}))
    return build_as(config, served_as=None)


def build_as(config: MoesaicConfig, *, served_as: str | None) -> Application:
    """As `build`. Args: served_as: the name that Serve will know it by, None: not known here."""
    from actors.ray_shells.deployments import ingress_application, worker_application
    from actors.ray_shells.gateway_actors import Gateways
    from actors.ray_shells.grpc_gateway import GrpcGateway
    from actors.ray_shells.host_actor import start_expert_hosts
    from actors.ray_shells.http_ingress import HttpIngress
    from actors.ray_shells.scheduler_actor import begin_deployment, start_scheduler
    from actors.ray_shells.shelf_actor import start_shelves

    check_possible(config)
    if config.redis.url is not None:
        check_redis(config.redis.url, connect=False)
    max_open = config.attention.max_running + config.attention.max_queue
    spec = specify(config, None)
    gateways = Gateways(spec.application)
    if config.grpc.enabled:
        gateways.check_port(config.grpc)
    begin_deployment(spec.without_keys(), served_as)
    start_expert_hosts(spec.without_secrets())  # they take longest
    spec = replace(spec, redis_url=_store_url(config))
    start_scheduler(spec.without_keys())
    if config.grpc.enabled:
        gateways.start(GrpcGateway, spec.without_store())
    else:
        gateways.stop()
    start_shelves(spec.without_keys())
    worker = worker_application(spec, max_open=max_open)
    return ingress_application(HttpIngress, spec.without_store(), worker, max_open=max_open)


def settle_length(config: MoesaicConfig, on_notice: Callable[[str], None] | None = None) -> MoesaicConfig:
    """The configuration with the sequence length that its KV cache has room for, by the memory of this node.

    Every process must know the same length. Args: on_notice: told in words what was lowered; default: logged.

    Raises:
        ConfigError: not even one sequence of the length asked for fits.
    """
    from cluster.node_memory.limits import free_memory_bytes

    attention, model = config.attention, config.model
    info = read_model_info(model)
    num_values = values_per_token(info.config)
    if num_values is None:
        return config  # the workers see by themselves
    num_processes = 1 if config.ray.address else attention.workers + config.experts.hosts
    is_asked = model.max_model_len is not None
    share = 1.0 if is_asked else SHARE  # what somebody asked for is refused only where it cannot be
    plan = plan_kv(
        attention.kv_cache,
        token_bytes=num_values * value_bytes(info.config, model.dtype),
        block_size=attention.block_size,
        model_len=info.max_model_len,
        is_asked=is_asked,
        available_bytes=int(free_memory_bytes() * share / num_processes),
    )
    if plan.notice is None:
        return config
    if on_notice is not None:
        on_notice(plan.notice)
    else:
        log_event(_LOG, logging.WARNING, "sequence length lowered", reason=plan.notice)
    return with_overrides(config, {"model": {"max_model_len": plan.max_model_len}})


def local_service(config: MoesaicConfig) -> GenerationService:
    """An engine and its generation service in this process, without Ray; blocks until it is ready."""
    from actors.attention.worker import AttentionWorker
    from cluster.frontend.build import build_front_end
    from cluster.stats.memory_store import MemoryStore

    config = settle_length(config)
    info = read_model_info(config.model)
    worker = AttentionWorker(config, info, MemoryStore())
    worker.start()
    atexit.register(worker.stop)  # saves what was learned; threads in native code must not outlive the interpreter
    while worker.phase is not StartupPhase.READY:
        if worker.error is not None:
            raise worker.error
        time.sleep(0.01)
    return build_front_end(config, info, worker)[0]


def run_server(config: MoesaicConfig, on_progress: Callable[[str], None]) -> int:
    """Start Ray and the application, report until ready, serve until SIGINT or SIGTERM, drain, stop.

    Returns:
        The process's exit code.
    """
    from actors.ray_shells.runtime import RayRuntime
    from cluster.frontend.serve_proxy.answers import PROXY_ENVIRONMENT

    settle_environment()
    config = settle_length(config if config.ray.address else with_absolute_paths(config), on_progress)
    stop = threading.Event()
    previous = {s: signal.signal(s, _setter(stop)) for s in (signal.SIGINT, signal.SIGTERM)}
    address, frontend = config.ray.address, config.frontend
    on_progress(f"joining Ray at {address}" if address else "starting a local Ray")
    take_secrets_from(os.environ)  # or every process of a Ray that is started here would have them
    application = config.ray.application_id
    runtime = RayRuntime(address=address, application=application, environment=PROXY_ENVIRONMENT)
    signal.signal(signal.SIGTERM, _setter(stop))  # `ray.init` has put a handler there that exits at once
    try:
        if _embeds_valkey(config):
            runtime.start_valkey()  # beside Serve's own start; `build` waits for it
        on_progress("starting Ray Serve")
        runtime.start_serve(host=frontend.host, port=frontend.port, request_timeout_s=frontend.request_timeout_s)
        runtime.check_route(name=application.name)
        on_progress("deploying the application")
        running = runtime.run(build_as(config, served_as=application.name), name=application.name)
        if _wait_until_ready(running, config.attention.workers, on_progress, stop):
            _print_ready(config, running.grpc_addresses(), on_progress)
            stop.wait()
            _drain(running, frontend.drain_timeout_s, on_progress)
        return 0
    finally:
        runtime.stop(application.name, num_hosts=config.experts.hosts)
        for number, handler in previous.items():
            signal.signal(number, handler)
        on_progress("stopped")


def _merged(args: dict[str, Any]) -> MoesaicConfig:
    """Serve's `args:` over environment and defaults."""
    return load_config(None, args) if args else from_tree(to_tree(load_config()))


def _store_url(config: MoesaicConfig) -> str | None:
    """URL of the statistics store; None leaves each worker with its own memory, shown as degraded."""
    from actors.ray_shells.valkey_actor import valkey_url

    if not _embeds_valkey(config):
        return config.redis.url
    try:
        return valkey_url(config.ray.application_id)
    except ConnectionError as error:
        log_event(_LOG, logging.ERROR, "statistics are shared with nobody and end with each worker", reason=str(error))
        return None


def _embeds_valkey(config: MoesaicConfig) -> bool:
    return config.redis.url is None and config.redis.embedded


def _wait_until_ready(
    running: RunningApplication, num_workers: int, on_progress: Callable[[str], None], stop: threading.Event
) -> bool:
    """Report each phase; False if asked to stop before it was ready.

    Raises:
        MoesaicError: the worker could not start.
    """
    seen: StartupPhase | None = None
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not stop.is_set():
        if time.monotonic() > deadline_s:
            raise MoesaicError(f"not ready after {_START_TIMEOUT_S:.0f} s; the last phase was: {seen}")
        try:
            statuses = running.worker_statuses()
        except Unavailable:  # too busy to answer in time, or Serve is replacing it
            if (reason := running.failure()) is not None:
                raise ConfigError(reason) from None
            stop.wait(_POLL_S)
            continue
        slowest = min(statuses, key=lambda status: list(StartupPhase).index(status.phase))
        failed = next((status for status in statuses if status.phase is StartupPhase.FAILED), None)
        if failed is not None:
            raise ConfigError(failed.error or "an attention worker could not start")
        if slowest.phase is not seen:
            seen = slowest.phase
            if seen is not StartupPhase.READY:
                on_progress(f"attention worker: {seen}")
        if seen is StartupPhase.READY and len(statuses) == num_workers:
            for line in {line: None for status in statuses for line in status.degraded}:
                on_progress(f"degraded: {line}")
            return True
        stop.wait(_POLL_S)
    return False


def _print_ready(config: MoesaicConfig, grpc_addresses: Sequence[str], on_progress: Callable[[str], None]) -> None:
    from cluster.frontend.security.cross_site import exposure_notices

    frontend = config.frontend
    info = read_model_info(config.model)
    url = f"http://{join_address(local_host(frontend.host), frontend.port)}"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if frontend.api_key else ""
    body = (
        f'{{"model": "{info.name}", "messages": [{{"role": "user", "content": "What is 12 + 30?"}}], "max_tokens": 32}}'
    )
    on_progress(
        f"ready: {info.name} at {url}/v1  (status: {url}/status, experts: {url}/experts, metrics: {url}/metrics)"
    )
    if chosen := info.sampling.given():
        values = ", ".join(f"{name} {value}" for name, value in chosen.items())
        on_progress(f"the model's author samples with {values}; --generation-config none leaves that out")
    for notice in exposure_notices(config):
        on_progress(f"warning: {notice}")
    for address in grpc_addresses:
        on_progress(f"ready: moesaic.v1 over gRPC{' with TLS' if config.grpc.tls_cert else ''} at {address}")
    on_progress(f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")


def _drain(running: RunningApplication, timeout_s: float, on_progress: Callable[[str], None]) -> None:
    """Refuse new requests and wait for those in flight."""
    running.begin_drain()
    deadline_s = time.monotonic() + timeout_s
    while (in_flight := running.num_in_flight()) and time.monotonic() < deadline_s:
        on_progress(f"draining: {in_flight} requests in flight")
        time.sleep(1.0)


def _setter(event: threading.Event) -> Callable[[int, FrameType | None], None]:
    return lambda _number, _frame: event.set()
