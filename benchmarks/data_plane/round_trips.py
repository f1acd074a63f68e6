"""Frames to a host that echoes them, by every carrier, in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from actors.data_plane.channel import ExpertChannel, HostEndpoint
from actors.data_plane.connect import Connector
from actors.data_plane.frames import CombineFrame, DispatchFrame
from benchmarks.data_plane.echo_host import EchoHost
from benchmarks.data_plane.gather import Gather
from benchmarks.shared.command_line import progress
from benchmarks.shared.report import Report

DIM = 1024  # 4 KB of float32 a row
SIZES_KB = (4, 16, 64, 256, 1024)
CARRIERS = ("shared_memory", "grpc", "actor_call")
MAX_SHM_64K_US = 60.0


def measure_round_trips(report: Report, rounds: int, block: int) -> None:
    """A row for each size, and the targets. Args: rounds: of blocks; block: round trips of a carrier in a row."""
    import ray

    progress("starting Ray and a host")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's spelling
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    gather = Gather()
    try:
        actor: Any = ray.remote(EchoHost).options(name="echo", max_concurrency=8, num_cpus=0).remote()
        endpoint: Any = ray.get(actor.endpoint.remote())
        namespace = ray.get_runtime_context().namespace
        endpoint = replace(endpoint, actor_name="echo", actor_namespace=namespace)
        channels = {carrier: _connect(carrier, endpoint) for carrier in CARRIERS}
        for size_kb in SIZES_KB:
            rows = np.random.default_rng(size_kb).standard_normal((size_kb * 1024 // (4 * DIM), DIM), dtype=np.float32)
            sides: dict[str, Callable[[], float]] = {
                name: _round_trip(channel, rows) for name, channel in channels.items()
            }
            sides["barriered gather"] = gather.prepare(rows)
            times = _alternate(sides, rounds, block)
            p50 = {name: float(np.percentile(values, 50)) for name, values in times.items()}
            row: dict[str, Any] = {"KB": size_kb}
            for name, values in times.items():
                row[f"{name} p50"], row[f"{name} p99"] = p50[name], float(np.percentile(values, 99))
            report.rows.append(row)
            report.at_most(f"{size_kb} KB: shared memory p50 / gRPC p50", p50["shared_memory"] / p50["grpc"], 1.0)
            report.at_most(f"{size_kb} KB: gRPC p50 / actor call p50", p50["grpc"] / p50["actor_call"], 1.0)
            if size_kb == 64:
                report.at_most("64 KB by shared memory, p50 us", p50["shared_memory"], MAX_SHM_64K_US)
        for channel in channels.values():
            channel.close()
    finally:
        gather.close()
        ray.shutdown()


def _connect(carrier: str, endpoint: HostEndpoint) -> ExpertChannel:
    connector = Connector(
        carrier,  # type: ignore[arg-type]
        worker_id="bench",
        fingerprint="",
        max_rows=max(SIZES_KB) * 1024 // (4 * DIM),
        dim=DIM,
        top_k=1,
    )
    return connector.connect(endpoint)


def _round_trip(channel: ExpertChannel, rows: np.ndarray) -> Callable[[], float]:
    ids = np.zeros((len(rows), 1), dtype=np.int64)
    weights = np.ones((len(rows), 1), dtype=np.float32)

    def run() -> float:
        began = time.perf_counter()
        frame = DispatchFrame(
            sequence=channel.next_sequence(),
            epoch=1,
            step=0,
            layer=0,
            micro_batch=0,
            deadline_us=10_000_000,
            rows=rows,
            expert_ids=ids,
            weights=weights,
        )
        channel.send(frame)
        answer = channel.receive(frame.sequence, time.monotonic() + 10)
        elapsed_s = time.perf_counter() - began
        assert isinstance(answer, CombineFrame)
        assert answer.rows[-1, -1] == rows[-1, -1]
        return elapsed_s * 1e6

    return run


def _alternate(sides: dict[str, Callable[[], float]], rounds: int, block: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-1, rounds):
        for name, run in sides.items():
            measured = [run() for _ in range(block if name != "actor_call" else max(10, block // 4))]
            if index >= 0:
                times[name] += measured
    return times
