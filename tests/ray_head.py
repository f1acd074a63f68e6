"""A Ray of one node as `ray start --head` starts it, with ports and a directory of its own, and `serve` against it."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from live_server import clean_environment, end_all, free_port, make_root, poll, processes_of

from cluster.frontend.serve_proxy.answers import PROXY_ENVIRONMENT

_BIN = Path(sys.executable).parent
_LIST_ACTORS = """
import json, ray, sys
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(json.dumps(ray.util.list_named_actors(all_namespaces=True)))
"""


@dataclass(frozen=True, slots=True)
class RayHead:
    """One that runs. `root` is its RAY_TMPDIR and TMPDIR and has its log."""

    process: subprocess.Popen[bytes]
    root: Path
    port: int
    dashboard: int
    environment: Mapping[str, str]

    @property
    def log(self) -> str:
        """What it and the commands printed, the last lines."""
        return "\n".join((self.root / "log").read_text(errors="replace").splitlines()[-40:])

    def deploy(self, tree: dict[str, Any]) -> None:
        """`serve deploy` of a Serve config; waits until the dashboard takes it."""
        config = self.root / "serve-config.yaml"
        config.write_text(yaml.safe_dump(tree))
        poll(
            lambda: self._serve("deploy", str(config)).returncode == 0,
            deadline_s=120,
            what=lambda: f"serve deploy; its log:\n{self.log}",
            every_s=1,
        )

    def shut_down_serve(self) -> None:
        """`serve shutdown`."""
        run = self._serve("shutdown", "-y")
        assert run.returncode == 0, self.log

    def applications(self) -> dict[str, dict[str, Any]]:
        """`serve status`: status and message of each application, by its name in Serve."""
        run = self._serve("status")
        return (yaml.safe_load(run.stdout) or {}).get("applications", {}) if run.returncode == 0 else {}

    def wait_for(self, application: str, status: str) -> dict[str, Any]:
        """Until Serve gives an application this status; what it says of it."""
        poll(
            lambda: self.applications().get(application, {}).get("status") == status,
            deadline_s=240,
            what=lambda: f"{application} {status}; {self.applications()}\n{self.log}",
            every_s=1,
        )
        return self.applications()[application]

    def detached_actors(self) -> set[tuple[str, str]]:
        """Namespace and name of every named actor but Serve's own."""
        command = [sys.executable, "-c", _LIST_ACTORS, f"127.0.0.1:{self.port}"]
        run = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        actors = json.loads(run.stdout.splitlines()[-1])
        return {(actor["namespace"], actor["name"]) for actor in actors if actor["namespace"] != "serve"}

    def num_processes(self, name: str) -> int:
        """Its processes with `name` in their command line."""
        return sum(name in " ".join(process.cmdline()) for process in processes_of(self.root))

    def _serve(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        assert self.process.poll() is None, self.log
        full = [str(_BIN / "serve"), command, "--address", f"http://127.0.0.1:{self.dashboard}", *arguments]
        run = subprocess.run(full, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=120)
        if run.returncode:
            (self.root / "log").open("a").write(run.stdout + run.stderr)
        return run


@contextmanager
def running_ray_head() -> Iterator[RayHead]:
    """It runs in the body; whatever is left of it afterwards is killed."""
    root = make_root()
    environment = clean_environment(
        RAY_TMPDIR=str(root),
        TMPDIR=str(root),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        **PROXY_ENVIRONMENT,
    )
    port, dashboard = free_port(), free_port()
    # Every port that has a default, so that this Ray can live beside another.
    options = {
        "port": port,
        "ray-client-server-port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "object-store-memory": 2**28,
    }
    head = [str(_BIN / "ray"), "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            head, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield RayHead(process, root, port, dashboard, environment)
    finally:
        end_all(root)
        process.wait(10)
        shutil.rmtree(root, ignore_errors=True)
