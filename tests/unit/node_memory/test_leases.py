"""Leases of several processes of one node: real processes, no Ray."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import Unavailable
from cluster.node_memory.leases import MemoryLease
from cluster.node_memory.share import MemoryLevel

MIB = 2**20  # a process fills a little besides what it promised
FREE = 10**9  # of a pretended machine, the same to all: what is filled does not change it
PROCESS = f"""
import json, sys
from pathlib import Path
from cluster.node_memory.leases import MemoryLease
from cluster.node_memory.share import MemoryLevel

directory, expected = Path(sys.argv[1]), int(sys.argv[2])
levels = lambda: (MemoryLevel("", {FREE}),)
lease = MemoryLease("model", expected=expected, directory=directory, levels=levels)
print("known", flush=True)
for line in sys.stdin:
    if line == "take\\n":
        taken = lease.take("experts.cache", most=10**12)
        lease.settle()
        print(taken, flush=True)
    elif line == "fill\\n":
        held = bytearray(b"x" * taken)
        print(len(held), flush=True)
"""
KEEP_LOCK = "import fcntl,sys; f=open(sys.argv[1],'a'); fcntl.flock(f,2); print(1,flush=True); input()"


class Process:
    """A process with a lease."""

    def __init__(self, directory: Path, expected: int = 1) -> None:
        command = [sys.executable, "-c", PROCESS, str(directory), str(expected)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, word: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(f"{word}\n")
        self.popen.stdin.flush()

    def hear(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def take(self) -> int:
        self.say("take")
        return int(self.hear())

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.popen.send_signal(number)
        self.popen.wait(timeout=30)
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()


def own_lease(directory: Path) -> MemoryLease:
    return MemoryLease("other model", directory=directory, levels=lambda: (MemoryLevel("", FREE),))


@pytest.mark.parametrize("expected", [1, 4])
def test_processes_that_start_together_promise_no_byte_twice_and_share_evenly(tmp_path: Path, expected: int) -> None:
    processes = [Process(tmp_path, expected) for _ in range(4)]
    try:
        assert {process.hear() for process in processes} == {"known"}
        for process in processes:
            process.say("take")
        taken = [int(process.hear()) for process in processes]

        assert sum(taken) <= FREE
        assert min(taken) > FREE // 10, f"{taken}: one got next to nothing"
        with own_lease(tmp_path) as lease:
            assert lease.available_bytes() == pytest.approx(FREE - sum(taken), abs=MIB)
    finally:
        for process in processes:
            process.end()


def test_a_dead_process_has_no_lease_whatever_it_died_of(tmp_path: Path) -> None:
    process = Process(tmp_path)
    assert process.hear() == "known"
    taken = process.take()
    with own_lease(tmp_path) as lease:
        before = lease.available_bytes()
        process.end(signal.SIGKILL)

        assert before == pytest.approx(FREE - taken, abs=MIB)
        assert lease.available_bytes() == FREE
        assert len(list(tmp_path.glob("*.lease"))) == 1, "what the dead one left is swept away"


def test_what_a_process_has_filled_is_not_counted_twice(tmp_path: Path) -> None:
    process = Process(tmp_path, expected=10)
    try:
        assert process.hear() == "known"
        taken = process.take()
        process.say("fill")
        assert int(process.hear()) == taken

        with own_lease(tmp_path) as lease:
            assert lease.available_bytes() > FREE - taken // 10, "it is in the kernel's numbers now"
    finally:
        process.end()


def test_own_promises_count_and_a_new_promise_replaces_the_old(tmp_path: Path) -> None:
    with own_lease(tmp_path) as lease:
        lease.book("attention.kv_cache", FREE // 5)
        first = lease.take("experts.cache", most=FREE)
        again = lease.take("experts.cache", most=FREE)

        assert (first, again) == pytest.approx((0.56 * FREE, 0.56 * FREE), abs=MIB)
        assert lease.available_bytes() == pytest.approx(0.24 * FREE, abs=MIB)
        assert lease.take("experts.cache", most=FREE, beside=3 * FREE // 10) == pytest.approx(0.35 * FREE, abs=MIB)


def test_a_closed_lease_and_a_damaged_file_promise_nothing(tmp_path: Path) -> None:
    other = own_lease(tmp_path)
    other.book("experts.cache", 9 * FREE // 10)
    (tmp_path / "1-aa.lease").write_text(json.dumps({"pid": 1}))
    (tmp_path / "2-bb.lease").write_text("{")
    with own_lease(tmp_path) as lease:
        assert lease.available_bytes() == pytest.approx(FREE // 10, abs=MIB)
        other.close()
        other.close()

        assert lease.available_bytes() == FREE


def test_who_keeps_the_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.node_memory.leases._LOCK_TIMEOUT_S", 0.05)
    holder = subprocess.Popen(
        [sys.executable, "-c", KEEP_LOCK, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(Unavailable, match="memory cannot be shared out"):
            own_lease(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
