"""`moesaic serve`: checks what can be checked at once, then hands over to `cluster.app`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import typer

from cluster.cli import flags
from cluster.cli.serve_checks import check_settings


def serve(
    model: flags.Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default 8000.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port for gRPC; default 50051.")] = None,
    grpc: Annotated[bool | None, typer.Option("--grpc/--no-grpc", help="Answer gRPC too; default yes.")] = None,
    config: flags.ConfigFile = None,
    expert_cache: flags.ExpertCache = None,
    eviction: flags.Eviction = None,
    prediction: flags.Prediction = None,
    ram_tier: flags.RamTier = None,
    link_gb_per_s: flags.LinkRate = None,
    policy_state: flags.PolicyState = None,
    kv_cache: flags.KvCache = None,
    max_model_len: flags.MaxModelLen = None,
    dtype: flags.Dtype = None,
    generation_config: flags.GenerationConfig = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="sampled|full", help="How weights are told apart; full reads all bytes.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Clients must send it as a bearer token.")] = None,
    operator_key: Annotated[
        str | None, typer.Option(help="Operators must send it to see or change the server.")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Requests that may wait; more are answered 429.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="redis://host:port/db; default: one of our own.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: a local one.")] = None,
    threads: flags.Threads = None,
    served_name: Annotated[str | None, typer.Option(help="Model name that clients use.")] = None,
    attention_workers: Annotated[int | None, typer.Option(min=1, help="Attention workers; default 1.")] = None,
    expert_hosts: Annotated[
        int | None, typer.Option(min=0, help="Processes that own experts; default 0: experts are in the worker.")
    ] = None,
    host_cache: Annotated[
        str | None, typer.Option(metavar="SIZE|PERCENT", help="Memory of each expert host; default: its experts.")
    ] = None,
) -> None:
    """Serve MODEL (default: the embedded moesaic-demo) over the OpenAI API until interrupted."""
    report = elapsed_reporter(time.monotonic)
    overrides = flags.engine_overrides(
        model=model,
        expert_cache=expert_cache,
        kv_cache=kv_cache,
        max_model_len=max_model_len,
        dtype=dtype,
        generation_config=generation_config,
        threads=threads,
        eviction=eviction,
        prediction=prediction,
        ram_tier=ram_tier,
        link_gb_per_s=link_gb_per_s,
        policy_state=policy_state,
    )
    overrides.setdefault("model", {}).update(served_name=served_name, fingerprint=fingerprint)
    overrides.setdefault("attention", {}).update(max_queue=max_queue, workers=attention_workers)
    overrides.setdefault("experts", {}).update(hosts=expert_hosts, host_cache=host_cache)
    overrides["frontend"] = {"host": host, "port": port, "api_key": api_key, "operator_key": operator_key}
    overrides["grpc"] = {"port": grpc_port, "enabled": grpc}
    overrides["redis"] = {"url": redis_url}
    overrides["ray"] = {"address": ray_address}
    settings = flags.read_config(config, flags.given_only(overrides), with_model=False)
    check_settings(settings)
    report(f"starting {settings.model.path}")
    from cluster.app import run_server  # brings in Ray

    raise typer.Exit(run_server(settings, report))


def elapsed_reporter(clock: Callable[[], float]) -> Callable[[str], None]:
    """Prints a line with the seconds since now in front of it."""
    start_s = clock()

    def report(line: str) -> None:
        typer.echo(f"[{clock() - start_s:6.1f} s] {line}")

    return report
