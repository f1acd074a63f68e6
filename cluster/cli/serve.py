"""`moesaic serve`: checks what can be checked at once, then hands over to `cluster.app`."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from typing import Annotated

import typer

from cluster.cli import flags
from cluster.errors import ConfigError


def serve(
    model: flags.Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default 8000.")] = None,
    config: flags.ConfigFile = None,
    expert_cache: flags.ExpertCache = None,
    kv_cache: flags.KvCache = None,
    max_model_len: flags.MaxModelLen = None,
    dtype: flags.Dtype = None,
    api_key: Annotated[str | None, typer.Option(help="Clients must send it as a bearer token.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait; more are answered 429.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="redis://host:port/db; default: one of our own.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: a local one.")] = None,
    threads: flags.Threads = None,
    served_name: Annotated[str | None, typer.Option(help="Model name that clients use.")] = None,
) -> None:
    """Serve MODEL (default: the embedded moesaic-demo) over the OpenAI API until interrupted."""
    report = elapsed_reporter(time.monotonic)
    overrides = flags.engine_overrides(
        model=model,
        expert_cache=expert_cache,
        kv_cache=kv_cache,
        max_model_len=max_model_len,
        dtype=dtype,
        threads=threads,
    )
    overrides.setdefault("model", {})["served_name"] = served_name
    overrides.setdefault("attention", {})["max_queue"] = max_queue
    overrides["frontend"] = {"host": host, "port": port, "api_key": api_key}
    overrides["redis"] = {"url": redis_url}
    overrides["ray"] = {"address": ray_address}
    settings = flags.read_config(config, flags.given_only(overrides))
    check_port_is_free(settings.frontend.host, settings.frontend.port)
    check_files(settings.model.path)
    report(f"starting {settings.model.path}")
    from cluster.app import run_server  # brings in Ray

    raise typer.Exit(run_server(settings, report))


def elapsed_reporter(clock: Callable[[], float]) -> Callable[[str], None]:
    """Prints a line with the seconds since now in front of it."""
    start_s = clock()

    def report(line: str) -> None:
        typer.echo(f"[{clock() - start_s:6.1f} s] {line}")

    return report


def check_files(model: str) -> None:
    """Find damaged or missing files of MODEL before anything is started; reads headers, no weights.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    from actors.model.safetensors_index import read_index
    from cluster.frontend.tokenizer import Tokenizer
    from cluster.model_info import resolve_model

    directory = resolve_model(model)
    read_index(directory)
    Tokenizer.load(directory)


def check_port_is_free(host: str, port: int) -> None:
    """Raise `ConfigError` if this address cannot be listened on; says why and what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r}: {error.strerror}; choose another with --host") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed one may linger
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                way_out = "stop the program that listens there, or choose another port with --port"
                raise ConfigError(f"port {port} on {host} is in use; {way_out}") from error
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; see --host, --port") from error
