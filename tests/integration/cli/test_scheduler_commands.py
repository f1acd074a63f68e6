"""`drain`, and what `status` says of the scheduler."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from live_server import poll
from typer.testing import Result

Run = Callable[..., Result]


def test_status_tells_of_the_scheduler(run: Run, server: Any) -> None:
    text = " ".join(run("status", "--url", server.url).stdout.split())  # lines are wrapped

    for part in (
        "scheduler: up 90 s, semantic routing; 1 workers and 1 expert hosts report",
        "prompts: 16 kinds, which tell 0.123 bits",
        "placement (auto): epoch 3, largest over mean load 1.25; 2 migrations of 7 plans, 3.0 MiB moved",
        "last plan: the hosts are level",
        "draining 0123456789ab: expert host 0: 12 experts",
    ):
        assert part in text
    assert json.loads(run("status", "--url", server.url, "--json").stdout)["scheduler"]["uptime_s"] == 90.4


def test_status_without_a_scheduler(run: Run, server: Any) -> None:
    del server.pages["/scheduler"]

    result = run("status", "--url", server.url)

    assert result.exit_code == 0
    assert "scheduler: does not answer" in result.stdout


def test_drain_tells_what_is_left_and_can_be_undone(run: Run, server: Any) -> None:
    line = {"node_id": "0123456789abcdef", "is_empty": False, "left": ["worker w0: 2 running, 0 waiting"]}
    server.pages["/drain"] = line

    text = run("drain", "10.0.0.7", "--url", server.url).stdout

    assert text == "node 0123456789ab takes nothing new; still there:\n  worker w0: 2 running, 0 waiting\n"
    assert json.loads(run("drain", "10.0.0.7", "--url", server.url, "--json").stdout) == line
    assert run("drain", "10.0.0.7", "--undo", "--url", server.url).stdout == "node 0123456789ab is used again\n"
    assert [body["undo"] for body in server.bodies] == [False, False, True]
    server.pages["/drain"] = {**line, "is_empty": True, "left": []}
    assert "is empty" in run("drain", "10.0.0.7", "--url", server.url).stdout


def test_the_exit_code_of_drain_says_whether_the_node_is_empty(run: Run, server: Any) -> None:
    line = {"node_id": "0123456789abcdef", "is_empty": False, "left": ["expert host 0: 12 experts"]}
    server.pages["/drain"] = line

    assert run("drain", "10.0.0.7", "--url", server.url).exit_code == 3
    assert run("drain", "10.0.0.7", "--wait", "2", "--url", server.url).exit_code == 3
    assert len(server.bodies) >= 3, "asked again until the time was over"
    assert run("drain", "10.0.0.7", "--undo", "--url", server.url).exit_code == 0
    server.pages["/drain"] = {**line, "is_empty": True, "left": []}
    assert run("drain", "10.0.0.7", "--wait", "60", "--url", server.url).exit_code == 0


def test_drain_waits_until_the_node_is_empty(run: Run, server: Any) -> None:
    line = {"node_id": "0123456789abcdef", "is_empty": False, "left": ["expert host 0: 12 experts"]}
    server.pages["/drain"] = line

    def end() -> None:
        poll(lambda: server.bodies, deadline_s=60, what="a first answer")
        server.pages["/drain"] = {**line, "is_empty": True, "left": []}

    thread = threading.Thread(target=end)
    thread.start()
    result = run("drain", "10.0.0.7", "--wait", "60", "--url", server.url)

    thread.join()
    assert (result.exit_code, "is empty" in result.stdout) == (0, True)
    names = [body["node"] for body in server.bodies]
    assert names == ["10.0.0.7", *["0123456789abcdef"] * (len(names) - 1)], "then by its id: a name may be gone"


def test_drain_of_an_unknown_node_is_one_line_and_a_code(run: Run, server: Any) -> None:
    server.error = (400, "no nodes are called 'x'; there are 0123 (10.0.0.7)")

    result = run("drain", "x", "--url", server.url)

    assert result.exit_code != 0
    assert "there are 0123 (10.0.0.7)" in result.output
