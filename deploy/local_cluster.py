"""Several Ray nodes on one machine, each in a network and mount namespace of its own (Linux, root, iproute2).

Each node has its own address, /dev/shm and Ray directory, so nodes cannot share memory and can be cut off or killed
like machines. Everything is found again through one state directory.

    python deploy/local_cluster.py up --nodes 2 --state DIR     start the nodes; prints the address of the Ray cluster
    python deploy/local_cluster.py run --node 1 --state DIR -- moesaic serve --ray-address 10.77.0.11:6379
    python deploy/local_cluster.py kill --node 2 --state DIR    kill -9 every process of a node
    python deploy/local_cluster.py cut --node 2 --state DIR     unplug its network; `heal` plugs it in again
    python deploy/local_cluster.py join --node 2 --state DIR    start a killed node again; a new one has the next number
    python deploy/local_cluster.py down --state DIR             end everything

Node i has the Ray resources `node-i` and one `place`: with `ray.worker_resources` and `ray.host_resources` a
configuration says what runs where; who needs a `place` has a node that nobody else has who needs one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

_PORT = 6379
_START_TIMEOUT_S = 240.0  # a busy machine starts Ray slowly
_KILL_TIMEOUT_S = 10.0
_HEALTH = {  # a dead node is noticed after (period + timeout) x threshold = 15 s
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_initial_delay_ms": "1000",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Names and addresses of the nodes; `tag` keeps several clusters of a machine apart."""

    state: Path
    tag: str
    subnet: str
    num_nodes: int
    cpus: int = 2

    @property
    def address(self) -> str:
        """Of the Ray cluster."""
        return f"{self.node_ip(1)}:{_PORT}"

    def node_ip(self, node: int) -> str:
        return f"{self.subnet}.{10 + node}"

    def namespace(self, node: int) -> str:
        return f"{self.tag}n{node}"

    def link(self, node: int) -> str:
        return f"{self.tag}v{node}"

    def environment(self) -> dict[str, str]:
        """What every process of the cluster needs."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.state / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.frontend.serve_proxy.answers:middlewares",
            **_HEALTH,
        }

    def save(self) -> None:
        facts = {"tag": self.tag, "subnet": self.subnet, "num_nodes": self.num_nodes, "cpus": self.cpus}
        (self.state / "cluster.json").write_text(json.dumps(facts))

    @classmethod
    def load(cls, state: Path) -> Cluster:
        try:
            facts = json.loads((state / "cluster.json").read_text())
        except OSError as error:
            raise SystemExit(f"no cluster in {state}: {error}") from error
        return cls(state, **facts)


def up(state: Path, num_nodes: int, cpus: int) -> Cluster:
    """Create the network and start a raylet in each node; returns when all have joined."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise SystemExit("network namespaces need root and iproute2 (`ip`)")
    state = state.resolve()
    state.mkdir(parents=True, exist_ok=True)
    number = secrets.randbelow(200) + 20
    cluster = Cluster(state, f"m{number}", f"10.77.{number}", num_nodes, cpus)
    cluster.save()
    token = state / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    try:
        _ip("link", "add", f"{cluster.tag}br", "type", "bridge")
        _ip("addr", "add", f"{cluster.subnet}.1/24", "dev", f"{cluster.tag}br")
        _ip("link", "set", f"{cluster.tag}br", "up")
        for node in range(1, num_nodes + 1):
            _add_node(cluster, node)
            _start_raylet(cluster, node)
        for node in range(2, num_nodes + 1):
            _wait_for_node(cluster, node, is_alive=True)
    except BaseException:
        down(cluster)
        raise
    return cluster


def run(cluster: Cluster, node: int, command: list[str]) -> int:
    """Run a command inside a node; its exit code."""
    return subprocess.call([*_enter(cluster, node), *_absolute(command)], env=cluster.environment())


def start(cluster: Cluster, node: int, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a command inside a node, in a session of its own; what it prints goes to `log`."""
    return subprocess.Popen(
        [*_enter(cluster, node), *_absolute(command)],
        env=cluster.environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def processes(cluster: Cluster, node: int) -> dict[int, str]:
    """Command lines of a node's processes, by process id; Ray writes what they are into theirs."""
    found: dict[int, str] = {}
    for pid in _processes(cluster, node):
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def kill(cluster: Cluster, node: int) -> None:
    """End every process of a node at once, as a power cut does."""
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while (pids := _processes(cluster, node)) and time.monotonic() < deadline_s:  # again: one may just have forked
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def set_link(cluster: Cluster, node: int, *, is_up: bool) -> None:
    """Plug a node's network cable in or out."""
    _ip("link", "set", cluster.link(node), "up" if is_up else "down")


def join(cluster: Cluster, node: int) -> Cluster:
    """Start a node that was killed, or that the others gave up while it was cut off; or add one. Returns when it has
    joined."""
    if node > cluster.num_nodes:
        cluster = replace(cluster, num_nodes=node)
        cluster.save()
        _add_node(cluster, node)
    kill(cluster, node)
    _wait_for_node(cluster, node, is_alive=False)
    _wait_for_node(cluster, node, is_alive=True)
    return cluster


def down(cluster: Cluster) -> None:
    """End all nodes and remove the network."""
    for node in range(1, cluster.num_nodes + 1):
        kill(cluster, node)
        _ip("netns", "del", cluster.namespace(node), check=False)
        _ip("link", "del", cluster.link(node), check=False)
    _ip("link", "del", f"{cluster.tag}br", check=False)
    (cluster.state / "cluster.json").unlink(missing_ok=True)


def _add_node(cluster: Cluster, node: int) -> None:
    namespace, link = cluster.namespace(node), cluster.link(node)
    _ip("netns", "add", namespace)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", link, "master", f"{cluster.tag}br")
    _ip("link", "set", link, "up")
    _ip("-n", namespace, "addr", "add", f"{cluster.node_ip(node)}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
    _ip("-n", namespace, "link", "set", "lo", "up")


def _start_raylet(cluster: Cluster, node: int) -> None:
    ray = Path(sys.executable).with_name("ray")
    where = (
        ["--head", f"--port={_PORT}", "--include-dashboard=false"] if node == 1 else [f"--address={cluster.address}"]
    )
    start = [
        *(str(ray), "start", *where, f"--node-ip-address={cluster.node_ip(node)}", f"--num-cpus={cluster.cpus}"),
        *("--object-store-memory=200000000", "--disable-usage-stats", "--block"),
        f'--resources={{"node-{node}": 1000, "place": 1}}',
    ]
    script = (
        'mount -t tmpfs -o size=1g tmpfs /dev/shm && mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && exec "$@"'
    )
    with (cluster.state / f"node-{node}.log").open("wb") as log:
        subprocess.Popen(
            [
                *("ip", "netns", "exec", cluster.namespace(node)),
                *("unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *start),
            ],
            env=cluster.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _wait_until(lambda: bool(_processes(cluster, node)), cluster, f"node {node}")
    if node == 1:
        _wait_until(lambda: _answers(cluster), cluster, "the head node")


def _answers(cluster: Cluster) -> bool:
    probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1).close()"
    command = [*_enter(cluster, 1), sys.executable, "-c", probe, cluster.node_ip(1), str(_PORT)]
    return subprocess.run(command, capture_output=True).returncode == 0


def is_alive(cluster: Cluster, node: int) -> bool:
    """Whether Ray counts the node as one of the cluster."""
    return _watch(cluster, node, is_alive=True, timeout_s=0.0).wait() == 0


def _wait_for_node(cluster: Cluster, node: int, *, is_alive: bool) -> None:
    """Return when Ray counts the node as one of the cluster, or counts it no more.

    A raylet that gave up, as on a busy machine it does after 30 s, is started again.
    """
    watch = _watch(cluster, node, is_alive=is_alive, timeout_s=_START_TIMEOUT_S)
    try:
        while watch.poll() is None:
            if is_alive and not _processes(cluster, node):
                _start_raylet(cluster, node)
            time.sleep(0.5)
    finally:
        watch.kill()
        watch.wait()
    if watch.returncode:
        what = "start" if is_alive else "end"
        raise SystemExit(f"node {node} did not {what}; see {cluster.state}/node-*.log")


def _watch(cluster: Cluster, node: int, *, is_alive: bool, timeout_s: float) -> subprocess.Popen[bytes]:
    """A process that exits with 0 once Ray says so, and with 1 after `timeout_s`: one, since each costs seconds."""
    script = (
        "import ray, sys, time\n"
        "address, ip, is_alive, timeout_s = sys.argv[1:]\n"
        "end_s = time.monotonic() + float(timeout_s)\n"
        "while True:\n"
        "    try:\n"
        "        ray.init(address=address, logging_level='ERROR', log_to_driver=False, ignore_reinit_error=True)\n"
        "        found = any(n['Alive'] and n['NodeManagerAddress'] == ip for n in ray.nodes())\n"
        "        if found == bool(int(is_alive)):\n"
        "            sys.exit(0)\n"
        "    except Exception:\n"
        "        pass\n"
        "    if time.monotonic() > end_s:\n"
        "        sys.exit(1)\n"
        "    time.sleep(0.5)\n"
    )
    arguments = [cluster.address, cluster.node_ip(node), str(int(is_alive)), str(timeout_s)]
    return subprocess.Popen(
        [*_enter(cluster, 1), sys.executable, "-c", script, *arguments],
        env=cluster.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _enter(cluster: Cluster, node: int) -> list[str]:
    """The prefix that runs a command in a node's namespaces: those of its oldest process."""
    pids = _processes(cluster, node)
    if not pids:
        raise SystemExit(f"node {node} has no processes; see {cluster.state / f'node-{node}.log'}")
    space = f"/proc/{min(pids)}/ns"
    return ["nsenter", f"--net={space}/net", f"--mount={space}/mnt", f"--wd={Path.cwd()}"]


def _processes(cluster: Cluster, node: int) -> list[int]:
    found = _ip("netns", "pids", cluster.namespace(node), check=False)
    return sorted(int(pid) for pid in found.split())


def _absolute(command: list[str]) -> list[str]:
    """A bare name is looked for beside this interpreter first: the node has no PATH of the virtual environment."""
    beside = Path(sys.executable).parent / command[0]
    return [str(beside) if beside.is_file() else command[0], *command[1:]]


def _wait_until(is_true: object, cluster: Cluster, what: str) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not is_true():  # type: ignore[operator]
        if time.monotonic() > deadline_s:
            raise SystemExit(f"{what} did not start; see {cluster.state}/node-*.log")
        time.sleep(0.2)


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "run", "kill", "cut", "heal", "join", "down"])
    parser.add_argument("--state", type=Path, default=Path("/tmp/moesaic-local-cluster"), help="where it is remembered")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2, help="of each node, as Ray counts them")
    parser.add_argument("--node", type=int, default=1)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, command = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if options.action == "up":
        cluster = up(options.state, options.nodes, options.cpus)
        print(cluster.address)
        return 0
    cluster = Cluster.load(options.state.resolve())
    if options.action == "run":
        return run(cluster, options.node, command or ["sh"])
    if options.action == "down":
        down(cluster)
    elif options.action == "kill":
        kill(cluster, options.node)
    elif options.action == "join":
        join(cluster, options.node)
    else:
        set_link(cluster, options.node, is_up=options.action == "heal")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
