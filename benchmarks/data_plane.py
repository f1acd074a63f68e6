"""The expert data plane: what a round trip costs by carrier and size, and what it leaves of a step.

First, frames of 4 KB to 1 MB go to a host that answers with the rows it got, through everything a real host has
(handler, batching pool, device owner): shared memory, gRPC stream and Ray actor call reach the same process, in turn.
Beside them a collective as the usual alternative: broadcast, gather and barrier over gloo, between two processes.

Then one attention worker and one expert host, a thread each, against one process with two threads: same wide model,
and prompts, 8 sequences, alternating, warm. (In bfloat16 the dense products of two threads round differently, so the
tokens of the two sides may part; tests/integration/hosts/test_expert_hosts.py shows in float32 that hosts change no
token.)

    python benchmarks/data_plane.py [--quick] [--json] [--factor 32]
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from harness import Report, arguments, median, progress, prompts_of_domains, wide_model
from transformers import AutoTokenizer

from actors.attention.build import HostAccess, build_engine
from actors.data_plane.channel import ExpertChannel, Hello, HostEndpoint, Welcome
from actors.data_plane.connect import Connector
from actors.data_plane.frames import Answer, CombineFrame, DispatchFrame, combine_bytes, decode_dispatch, encode_answer
from actors.engine.parts import EngineParts
from cluster.config.load import MoesaicConfig, load_config
from cluster.model.info import load_model_info
from cluster.types import GenerationRequest, RequestId, SamplingParams, StartupPhase

DIM = 1024  # 4 KB of float32 a row
SIZES_KB = (4, 16, 64, 256, 1024)
CARRIERS = ("shared_memory", "grpc", "actor_call")
MAX_SHM_64K_US = 60.0
MIN_SHARE = 0.9
SHARED_CACHE = "40%"  # of the experts, in the worker's own memory: it computes while the host does
SEQUENCES = 8


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--factor", type=int, default=32)
    options = parser.parse_args()
    rounds, block = (6, 40) if options.quick else (20, 100)
    report = Report("Data plane round trips (request and answer of the given size), microseconds")
    _micro(report, rounds, block)
    _macro(report, wide_model(options.factor), *((3, 24) if options.quick else (7, 64)))
    return report.finish(as_json=options.json)


class _Echo:
    """A backend that answers with the rows it was given."""

    def check(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> None:
        """Everything is fine."""

    def partial_sums(self, layer: int, x_TD: torch.Tensor, ids_TK: object, weights_TK: object) -> torch.Tensor:
        """The rows."""
        return x_TD


class EchoHost:
    """All of an expert host but its experts; a Ray actor, so that the actor call reaches it too."""

    def __init__(self) -> None:
        from actors.data_plane.grpc_stream import ExpertServer
        from actors.expert_host.batching_pool import BatchingPool
        from actors.expert_host.device_owner import DeviceOwner
        from actors.expert_host.handler import HostHandler

        torch.set_num_threads(1)
        self._secret = secrets.token_hex(8)
        self._handler = HostHandler(self._welcome, secret=self._secret)
        backend: Any = _Echo()
        self._owner = DeviceOwner(self._handler, BatchingPool(max_rows=4096), backend)
        self._server = ExpertServer(
            host="127.0.0.1", secret=self._secret, welcome=self._welcome, submit=self._handler.submit
        )
        self._server.start()
        self._owner.start()

    def endpoint(self) -> HostEndpoint:
        """Where it listens."""
        return HostEndpoint(
            host_id="echo",
            socket_name=self._handler.socket_name,
            grpc_address=self._server.address,
            secret=self._secret,
        )

    def welcome_json(self, worker_id: str, fingerprint: str) -> dict[str, object]:
        """Handshake of the actor call."""
        return self._welcome(Hello(worker_id=worker_id, fingerprint=fingerprint)).to_json()

    def dispatch(self, data: bytes) -> bytes:
        """One frame of the actor call."""
        from actors.data_plane.task import DispatchTask

        answered: Future[Answer] = Future()
        frame = decode_dispatch(memoryview(bytearray(data)))
        self._handler.submit(DispatchTask(frame, answered.set_result))
        buffer = bytearray(combine_bytes(*frame.rows.shape))
        return bytes(buffer[: encode_answer(answered.result(), memoryview(buffer))])

    def _welcome(self, hello: Hello) -> Welcome:
        return Welcome(host_id="echo", epoch=1, num_experts=1, owned={0: (0,)})


def _micro(report: Report, rounds: int, block: int) -> None:
    import ray

    progress("starting Ray and a host")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's spelling
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    gather = _Gather()
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


class _Gather:
    """Two processes and a collective: the rows are broadcast, gathered, and everybody waits for everybody."""

    def __init__(self) -> None:
        port = _free_port()
        context = multiprocessing.get_context("spawn")
        self._commands, theirs = context.Pipe()
        self._process = context.Process(target=_gather_peer, args=(port, theirs), daemon=True)
        self._process.start()
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)

    def prepare(self, rows: np.ndarray) -> Callable[[], float]:
        """A round trip of these rows."""
        self._commands.send(rows.shape)
        self._commands.recv()
        mine, back = torch.from_numpy(rows), [torch.empty(rows.shape), torch.empty(rows.shape)]

        def run() -> float:
            self._commands.send("go")
            self._commands.recv()
            began = time.perf_counter()
            dist.broadcast(mine, 0)
            dist.gather(mine, back, dst=0)
            dist.barrier()
            return (time.perf_counter() - began) * 1e6

        return run

    def close(self) -> None:
        """End the peer."""
        self._commands.send(None)
        self._process.join(timeout=10)
        dist.destroy_process_group()


def _gather_peer(port: int, commands: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2)
    rows = torch.empty(1)
    while (command := commands.recv()) is not None:
        commands.send("ready")
        if command == "go":
            dist.broadcast(rows, 0)
            dist.gather(rows, None, dst=0)
            dist.barrier()
        else:
            rows = torch.empty(command)
    dist.destroy_process_group()


def _macro(report: Report, path: Path, rounds: int, num_tokens: int) -> None:
    info = load_model_info(str(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text).input_ids[:32] for text in prompts_of_domains(SEQUENCES)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_host_process, args=(path, theirs), daemon=True)
    process.start()
    progress("loading one process with two threads, and a worker with a host")
    endpoint: HostEndpoint = ours.recv()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = build_engine(_config(path, hosts=0), info, threads=2)
        access = HostAccess(worker_id="bench", locate=lambda _: endpoint)
        split = build_engine(_config(path, hosts=1), info, threads=1, hosts=access)
        shared = build_engine(_config(path, hosts=1, cache=SHARED_CACHE), info, threads=1, hosts=access)
        speeds: dict[str, list[float]] = {"alone": [], "split": [], "shared": []}
        shares: list[float] = []
        equal = 0.0
        for index in range(-1, rounds):
            torch.set_num_threads(2)
            speed, tokens = _run(alone, prompts, num_tokens)
            torch.set_num_threads(1)
            counters = split.dispatcher.counters  # type: ignore[attr-defined]
            before, began = counters.wait_s + counters.send_s - counters.host_s, time.perf_counter()
            other, same = _run(split, prompts, num_tokens)
            share = (counters.wait_s + counters.send_s - counters.host_s - before) / (time.perf_counter() - began)
            equal = sum(a == b for a, b in zip(tokens, same, strict=True)) / len(tokens)
            third, _ = _run(shared, prompts, num_tokens)
            progress(
                f"round {index + 1} of {rounds}: one process {speed:.1f}, worker and host {other:.1f}, "
                f"with {SHARED_CACHE} of the experts in the worker {third:.1f} tok/s"
            )
            if index >= 0:
                speeds["shared"].append(third)
                speeds["alone"].append(speed)
                speeds["split"].append(other)
                shares.append(share)
    ratio, shared_ratio = (
        median([b / a for a, b in zip(speeds["alone"], speeds[side], strict=True)]) for side in ("split", "shared")
    )
    report.notes.append(
        f"{path.name}, bfloat16, {SEQUENCES} sequences, {num_tokens} tokens each: one process with two threads "
        f"{median(speeds['alone']):.1f} tok/s; worker and host with a thread each {median(speeds['split']):.1f} tok/s; "
        f"carrier {split.links.carriers[0] if split.links else '-'}; the data plane's share of a step is "
        f"{100 * median(shares):.1f}% (waiting and sending, less what the host computed); "
        f"{100 * equal:.0f}% of the tokens are equal"
    )
    report.notes.append(
        f"the same with {SHARED_CACHE} of the experts in the worker's own memory as well: "
        f"{median(speeds['shared']):.1f} tok/s"
    )
    report.at_least("worker + host / one process, same threads", ratio, MIN_SHARE)
    report.at_least(f"the same, {SHARED_CACHE} in the worker too", shared_ratio, MIN_SHARE)
    split.dispatcher.close()
    shared.dispatcher.close()
    ours.send(None)
    process.join(timeout=10)


def _config(path: Path, *, hosts: int, cache: str = "0") -> MoesaicConfig:
    experts = {"hosts": hosts, "cache": cache if hosts else "100%", "host_threads": 1}
    return load_config(None, {"model": {"path": str(path), "dtype": "bfloat16"}, "experts": experts})


def _host_process(path: Path, commands: Connection) -> None:
    from actors.expert_host.host import ExpertHost

    host = ExpertHost(_config(path, hosts=1), load_model_info(str(path)), 0)
    host.start("127.0.0.1")
    while host.phase is not StartupPhase.READY:
        if host.error is not None:
            raise host.error
        time.sleep(0.05)
    commands.send(host.endpoint())
    commands.recv()
    host.stop()


def _run(parts: EngineParts, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[tuple[str, int]]]:
    """Decode tokens per second after all first tokens, and every token."""
    sampling = SamplingParams(max_tokens=num_tokens + 1, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        parts.engine.add(GenerationRequest(request_id=RequestId(str(i)), prompt_ids=tuple(prompt), sampling=sampling))
    outputs: list[tuple[str, int]] = []
    while len(outputs) < len(prompts):
        outputs += [(o.request_id, o.token_id) for o in parts.engine.step()]
    first, began = len(outputs), time.perf_counter()
    while parts.engine.has_work:
        outputs += [(o.request_id, o.token_id) for o in parts.engine.step()]
    return (len(outputs) - first) / (time.perf_counter() - began), sorted(outputs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
