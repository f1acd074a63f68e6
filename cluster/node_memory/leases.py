"""Leases of memory: what the processes of one node have promised themselves, so that no two promise the same bytes.

A process has one file in a directory of the node. It holds a lock on that file as long as it lives, and the system lets
go of it whatever the process dies of: a file that nobody has locked is no lease. Decisions are in
cluster/node_memory/share.py, limits in cluster/node_memory/limits.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import RLock
from typing import BinaryIO, Self

from cluster.errors import Unavailable
from cluster.logs import log_event
from cluster.node_memory.limits import control_group, filled_bytes, memory_levels, started_ticks
from cluster.node_memory.share import LeaseFacts, MemoryLevel, fair_share, open_bytes, unpromised_bytes

_LOG = logging.getLogger(__name__)
_LOCK = "lock"  # who reads or writes leases has it; for as long as that takes
_SUFFIX = ".lease"
_LOCK_TIMEOUT_S = 10.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What a lease's file says. started: see started_ticks. before: its bytes when it began to fill. is_shared: what
    it fills is shared memory."""

    pid: int
    started: int
    group: str
    family: str
    before: int
    promised: Mapping[str, int] = field(default_factory=dict[str, int])
    is_settled: bool = False
    is_shared: bool = False

    def filled(self) -> int | None:
        return filled_bytes(self.pid, self.started, shared=self.is_shared)

    def facts(self) -> LeaseFacts:
        promised = sum(self.promised.values())
        now = self.filled()  # None: of another PID namespace; nothing is known to be filled
        left = promised if now is None else open_bytes(promised=promised, before=self.before, now=now)
        return LeaseFacts(group=self.group, family=self.family, open_bytes=left, is_settled=self.is_settled)


class MemoryLease:
    """What this process may fill. Thread-safe; between processes the directory's lock decides."""

    def __init__(
        self,
        family: str,
        *,
        expected: int = 1,
        is_shared: bool = False,
        directory: Path | None = None,
        levels: Callable[[], tuple[MemoryLevel, ...]] = memory_levels,
    ) -> None:
        """Be known to the others from now on, with nothing promised.

        Args: family: which deployed model. expected: processes of it that will be on this node, this one included.
        is_shared: what it will fill is shared memory. directory: of the node's leases. levels: what is free.

        Raises:
            Unavailable: another process keeps the directory's lock.
        """
        self._expected, self._levels = expected, levels
        self._lock = RLock()
        self._file: BinaryIO | None = None
        pid = os.getpid()
        self._entry = _Entry(
            pid=pid, started=started_ticks(pid), group=control_group(), family=family, before=0, is_shared=is_shared
        )
        self._entry = replace(self._entry, before=self._entry.filled() or 0)
        self._directory = lease_directory() if directory is None else directory
        if self._directory is None:
            log_event(_LOG, logging.WARNING, "no directory for memory leases; other processes' promises are not seen")
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._path = self._directory / f"{pid}-{secrets.token_hex(4)}{_SUFFIX}"
            self._file = self._path.open("x+b", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write()

    def available_bytes(self) -> int:
        """What is promised to nobody, this process's own promises deducted; not all of it is this process's share."""
        with self._locked():
            return unpromised_bytes(self._levels(), (*self._others(), self._entry.facts()))

    def room_for(self, purpose: str) -> int:
        """Bytes that this process could promise itself for a purpose at most, what it has promised for it included."""
        with self._locked():
            free = unpromised_bytes(self._levels(), (*self._others(), self._entry.facts()))
            return free + self._entry.promised.get(purpose, 0)

    def take(self, purpose: str, *, most: int, beside: int = 0) -> int:
        """Promise this process a fair share of what is promised to nobody, and say how many bytes that is.

        Args: purpose: replaces what was promised for it before. most: more is not wanted. beside: bytes it will need
        for what it has not promised itself yet.
        """
        with self._locked():
            self._promise(purpose, 0)
            others = tuple(self._others())
            free = unpromised_bytes(self._levels(), (*others, self._entry.facts())) - beside
            share = fair_share(free, others, family=self._entry.family, expected=self._expected)
            taken = min(most, share)
            self._promise(purpose, taken)
            return taken

    def book(self, purpose: str, num_bytes: int) -> None:
        """Promise this process what a setting says; replaces what was promised for this purpose before."""
        with self._locked():
            self._promise(purpose, num_bytes)

    def note_loaded(self) -> None:
        """What this process has filled so far was no part of its promises: the model's weights."""
        with self._locked():
            self._entry = replace(self._entry, before=self._entry.filled() or 0)
            self._write()

    def settle(self) -> None:
        """Nothing more will be taken: the others need not leave room for it."""
        with self._locked():
            self._entry = replace(self._entry, is_settled=True)
            self._write()

    def close(self) -> None:
        """Give everything back; idempotent."""
        with self._lock:
            if self._file is not None:
                self._path.unlink(missing_ok=True)
                self._file.close()  # and its lock
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _promise(self, purpose: str, num_bytes: int) -> None:
        self._entry = replace(self._entry, promised={**self._entry.promised, purpose: num_bytes})
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            data = json.dumps(asdict(self._entry)).encode()
            self._file.seek(0)
            self._file.truncate()
            self._file.write(data)

    def _others(self) -> Iterator[LeaseFacts]:
        """Leases of the others that live; what dead ones left is removed."""
        if self._directory is None:
            return
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            if self._file is not None and path == self._path:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError), path.open("rb") as file:
                if _is_locked(file):
                    yield _Entry(**json.loads(file.read())).facts()
                else:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        with self._lock:
            if self._directory is None:
                yield
                return
            with (self._directory / _LOCK).open("ab") as file:
                _lock_within(file, _LOCK_TIMEOUT_S)
                yield


def lease_directory() -> Path | None:
    """Where this user's processes on this node find each other's leases; None: nowhere can be written."""
    for base in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        path = base / f"moesaic-memory-{os.getuid()}"
        with contextlib.suppress(OSError):
            path.mkdir(mode=0o700, exist_ok=True)
            if path.stat().st_uid == os.getuid() and os.access(path, os.W_OK):
                return path
    return None


def _is_locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _lock_within(file: BinaryIO, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise Unavailable(
                    f"{file.name} was locked by another process for {timeout_s:g} s: memory cannot be shared out; "
                    f"end the process that has it (fuser {file.name})"
                ) from None
            time.sleep(_POLL_S)
