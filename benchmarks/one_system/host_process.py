"""An expert host in a process of its own, without Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from actors.data_plane.channel import HostEndpoint
from actors.expert_host.host import ExpertHost
from actors.ray_shells.deployments import SWITCH_INTERVAL_S
from cluster.config.load import load_config
from cluster.model.info import load_model_info
from cluster.status.expert_memory import ExpertMemoryStatus
from cluster.types import StartupPhase

_START_LIMIT_S = 300.0


class HostProcess:
    """The other end of one; `endpoint` and `memory` ask it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def endpoint(self) -> HostEndpoint:
        """Where workers connect, once it is ready."""
        return self._ask("endpoint")

    def memory(self) -> ExpertMemoryStatus:
        """What it says of its memory now."""
        return self._ask("memory")

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        if not self._pipe.poll(_START_LIMIT_S):
            raise TimeoutError(f"an expert host did not say its {what}")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextlib.contextmanager
def host_processes(path: str, num: int, sections: Mapping[str, Any], *, max_len: int) -> Iterator[list[HostProcess]]:
    """Hosts of a model, ready, whose RAM tier is full. Args: sections: of the configuration."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for index in range(num):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, path, index, dict(sections), max_len), daemon=True)
            process.start()
            pipes.append(ours)
            processes.append(process)
        yield [HostProcess(pipe) for pipe in pipes]
    finally:
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send("stop")
        for process in processes:
            process.join(20)
            process.kill()


def _serve(pipe: Connection, path: str, index: int, sections: dict[str, Any], max_len: int) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    host = ExpertHost(load_config(None, sections), load_model_info(path, max_model_len=max_len), index)
    host.start("127.0.0.1")
    try:
        while (what := pipe.recv()) != "stop":
            try:
                pipe.send(_ready_endpoint(host) if what == "endpoint" else host.status().expert_memory)
            except Exception as error:  # noqa: BLE001 - whoever asked says it
                pipe.send(error)
    finally:
        host.stop()


def _ready_endpoint(host: ExpertHost) -> HostEndpoint:
    deadline = time.monotonic() + _START_LIMIT_S
    while host.phase is not StartupPhase.READY or not _is_full(host):
        if host.error is not None or time.monotonic() > deadline:
            raise host.error or TimeoutError("an expert host did not get ready")
        time.sleep(0.05)
    return host.endpoint()


def _is_full(host: ExpertHost) -> bool:
    store = host.backend.store if host.backend is not None else None
    return store is not None and store.ram_resident * store.slot_bytes >= min(store.ram_budget_bytes, store.model_bytes)
