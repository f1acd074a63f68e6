"""The usual alternative to a data plane: a collective over gloo between two processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.shared.served import free_port


class Gather:
    """Two processes and a collective: the rows are broadcast, gathered, and everybody waits for everybody."""

    def __init__(self) -> None:
        port = free_port()
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
