"""A cluster of three nodes on this machine that answers: two attention workers with expert memory of their own, three
expert hosts, a front end for HTTP and one for gRPC on every node (Linux, root, iproute2).

    python deploy/three_nodes.py [--state DIR] [--config FILE] [flags of `moesaic serve`]

Prints where it listens, serves until Ctrl-C, then ends everything. Meanwhile deploy/local_cluster.py with the same
--state kills, cuts off, heals and starts nodes.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import local_cluster
from local_cluster import Cluster

NUM_NODES, NUM_WORKERS, NUM_HOSTS = 3, 2, 3
HTTP_PORT, GRPC_PORT = 8000, 50051
CONFIG = Path(__file__).resolve().with_name("three_nodes.yaml")

_READY_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ThreeNodes:
    """The cluster and the `moesaic serve` on its first node."""

    cluster: Cluster
    server: subprocess.Popen[bytes] | None = None  # None: somebody else's

    def url(self, node: int) -> str:
        """Of the HTTP front end of a node."""
        return f"http://{self.cluster.node_ip(node)}:{HTTP_PORT}"

    def grpc_address(self, node: int) -> str:
        """Of the gRPC front end of a node."""
        return f"{self.cluster.node_ip(node)}:{GRPC_PORT}"

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self.cluster.state / "serve.log"

    def status(self, node: int = 1) -> dict[str, Any] | None:
        """GET /status of a node's front end; None if it does not answer."""
        return _page(f"{self.url(node)}/status")

    def problems(self) -> set[str]:
        """What is missing or works in part only, as all front ends see it; in words."""
        found: set[str] = set()
        for node in range(1, NUM_NODES + 1):
            status = self.status(node)
            if status is None:
                found.add(f"no HTTP at node {node}")
                continue
            for kind, number in (("workers", NUM_WORKERS), ("hosts", NUM_HOSTS)):
                ready = sum(process["phase"] == "ready" for process in status[kind])
                if ready != number:
                    found.add(f"{ready} of {number} {kind} ready")
                found.update(line for process in status[kind] for line in process["degraded"])
            if not _listens(self.cluster.node_ip(node), GRPC_PORT):
                found.add(f"no gRPC at node {node}")
        return found


@contextmanager
def three_nodes(state: Path, config: Path = CONFIG, flags: Sequence[str] = ()) -> Iterator[ThreeNodes]:
    """Start everything; it is ready in the body and ended after it."""
    cluster = local_cluster.up(state, NUM_NODES, 2)
    try:
        command = ["moesaic", "serve", "--ray-address", cluster.address, "--config", str(config.resolve()), *flags]
        with (cluster.state / "serve.log").open("wb") as log:
            server = local_cluster.start(cluster, 1, command, log)
        nodes = ThreeNodes(cluster, server)
        _wait_ready(nodes)
        yield nodes
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.wait(_STOP_TIMEOUT_S)
    finally:
        local_cluster.down(cluster)


def _wait_ready(nodes: ThreeNodes) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while problems := {problem for problem in nodes.problems() if "ready" in problem or problem.startswith("no ")}:
        if (nodes.server is not None and nodes.server.poll() is not None) or time.monotonic() > deadline_s:
            log = nodes.log.read_text(errors="replace")[-3000:]
            raise SystemExit(f"not ready: {', '.join(sorted(problems))}; its log:\n{log}")
        time.sleep(0.5)


def _page(url: str) -> dict[str, Any] | None:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url, timeout=6) as answer:
            return json.load(answer)
    except (OSError, ValueError, urllib.error.URLError):
        return None


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path("/tmp/moesaic-three-nodes"), help="where it is remembered")
    parser.add_argument("--config", type=Path, default=CONFIG)
    options, flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, _interrupt)
    print("starting three nodes", file=sys.stderr)
    try:
        with three_nodes(options.state, options.config, flags) as nodes:
            for node in range(1, NUM_NODES + 1):
                print(f"node {node}: {nodes.url(node)}/v1, gRPC {nodes.grpc_address(node)}", flush=True)
            print(f"log: {nodes.log}", flush=True)
            while nodes.server is None or nodes.server.poll() is None:
                time.sleep(1)
    except KeyboardInterrupt:
        pass
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
