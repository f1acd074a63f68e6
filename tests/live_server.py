"""A real `moesaic serve`: its own process group, port and Ray directory. Knows processes; knows no API but /ready.

Processes of a server are found by the server's RAY_TMPDIR in their environment, which they have also when
they were started in sessions of their own or their parent is gone.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

COMMAND = Path(sys.executable).parent / "moesaic"
READY_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0

_GONE_DEADLINE_S = 10.0
_LOG_TAIL_LINES = 30
_AT_ONCE = {"MOESAIC__FRONTEND__STATUS_MAX_AGE_S": "0"}  # pages show what a test has just done

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A server under way. `root` is its RAY_TMPDIR and has its log."""

    process: subprocess.Popen[bytes]
    port: int
    root: Path
    grpc_port: int
    host: str = "127.0.0.1"  # as in a URL

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        """What it printed, the last lines."""
        return "\n".join((self.root / "log").read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])

    def get(self, path: str) -> dict[str, Any]:
        """A JSON page. A worker that is too busy to answer at once makes it a 503, which says to come again."""
        end_s = time.monotonic() + 30
        while (answer := httpx.get(self.url + path, timeout=20)).status_code == 503 and time.monotonic() < end_s:
            time.sleep(float(answer.headers["retry-after"]))
        return answer.raise_for_status().json()

    def worker(self) -> dict[str, Any]:
        """The attention worker's part of /status."""
        return self.get("/status")["workers"][0]

    def wait_ready(self) -> None:
        """Until /ready says so; fails at once when the process has ended."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
            return _status_code(self.url + "/ready") == 200

        poll(is_ready, deadline_s=READY_DEADLINE_S, what=lambda: f"ready; its log:\n{self.log}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Ask it to end; it must, with exit code 0 and all its processes."""
        self.process.send_signal(number)
        self.assert_ends(0)

    def assert_ends(self, code: int, deadline_s: float = STOP_DEADLINE_S) -> None:
        """It ends by itself with `code`, and no process that it ever had is left."""
        seen: set[psutil.Process] = set()

        def has_ended() -> bool:
            seen.update(processes_of(self.root))
            return self.process.poll() is not None

        poll(has_ended, deadline_s=deadline_s, what=lambda: f"the end of the server; its log:\n{self.log}", every_s=0.2)
        assert self.process.returncode == code, self.log
        poll(
            lambda: not any(_lives(process) for process in seen),
            deadline_s=_GONE_DEADLINE_S,
            what=lambda: f"no process left behind; there are {[p for p in seen if _lives(p)]}",
        )


def launch(
    *flags: str,
    prefix: Sequence[str] = (),
    prepare: Callable[[Path], None] | None = None,
    host: str = "127.0.0.1",
    **environment: str,
) -> LiveServer:
    """Start `moesaic serve` with `flags` and return at once.

    Args: prefix: a command that runs it. prepare: gets its working directory, first. host: where it is found, as in a
    URL.
    """
    root = make_root()
    if prepare is not None:
        prepare(root)
    port, grpc_port = free_port(), free_port()
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [*prefix, str(COMMAND), "serve", "--port", str(port), "--grpc-port", str(grpc_port), *flags],
            cwd=root,
            env=clean_environment(**({"RAY_TMPDIR": str(root)} | _AT_ONCE | environment)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return LiveServer(process, port, root, grpc_port, host)


@contextmanager
def launched(*flags: str, **launch_options: Any) -> Iterator[LiveServer]:
    """A server that may not even start; whatever is left of it at the end is killed."""
    server = launch(*flags, **launch_options)
    try:
        yield server
    finally:
        end_all(server.root)
        server.process.wait(10)
        shutil.rmtree(server.root, ignore_errors=True)


@contextmanager
def running_server(*flags: str, **launch_options: Any) -> Iterator[LiveServer]:
    """A ready server; at the end it must stop cleanly, if the body has not stopped it."""
    with launched(*flags, **launch_options) as server:
        server.wait_ready()
        yield server
        if server.process.poll() is None:
            server.stop()


def poll(look: Callable[[], Found], *, deadline_s: float, what: Callable[[], str] | str, every_s: float = 0.1) -> Found:
    """The first true result of `look`; fails when there is none before the deadline."""
    end_s = time.monotonic() + deadline_s
    while not (found := look()):
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {deadline_s:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(every_s)
    return found


def make_root() -> Path:
    """A directory with a short name: Ray puts sockets far below it, and their paths have at most 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="msc", dir="/tmp"))


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without settings of Ray or Moesaic that the machine may have."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOESAIC", "RAY_"))}
    return kept | extra


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, outside the range from which the system and Ray take theirs: nobody
    has it by the time the server listens."""
    for _ in range(1000):
        port = random.SystemRandom().randint(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 20000 and 32000")


def processes_of(root: Path) -> set[psutil.Process]:
    """Living processes started for `root`, and their descendants: some programs overwrite their environment."""
    found = {process for process in psutil.process_iter() if _has_root(process, root)}
    for process in tuple(found):
        with suppress(psutil.NoSuchProcess):
            found.update(process.children(recursive=True))
    return {process for process in found if _lives(process)}


def end_all(root: Path) -> None:
    """Kill what is left of `root`, by process id, and what that starts meanwhile."""

    def none_left() -> bool:
        left = processes_of(root)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return not left

    poll(none_left, deadline_s=_GONE_DEADLINE_S, what=lambda: f"the end of {processes_of(root)}")


def _has_root(process: psutil.Process, root: Path) -> bool:
    # Read here, because psutil stops at the zeros that Ray leaves there when it renames its processes.
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or not ours to look at
        return False
    return f"RAY_TMPDIR={root}".encode() in environment


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _status_code(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return None
