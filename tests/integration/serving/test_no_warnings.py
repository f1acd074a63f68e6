"""A normal run says nothing that is not ours: no library warns, of whatever it will do one day."""

from __future__ import annotations

import re
import subprocess

import httpx
import pytest
from live_server import COMMAND, LiveServer, clean_environment

_KILLED = "A worker died or was killed"  # Ray's word when another test has killed a gateway of that server
_OUR_LINE = re.compile(r"\[ *\d+\.\d s\] ")


@pytest.mark.ray
def test_a_server_prints_only_lines_of_its_own(server: LiveServer) -> None:
    """The one that other tests use: whatever they made it do."""
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "Once", "max_tokens": 4}, timeout=60).raise_for_status()
    lines = (server.root / "log").read_text().splitlines()
    foreign = [line for line in lines if not _OUR_LINE.match(line) and _KILLED not in line]
    assert foreign == []
    errors = "\n".join(path.read_text(errors="replace") for path in server.root.rglob("logs/worker-*.err"))
    assert not [line for line in errors.splitlines() if "FutureWarning" in line or "DeprecationWarning" in line]


@pytest.mark.slow
def test_a_command_that_computes_prints_its_answer_alone() -> None:
    words = ["generate", "--prompt", "Once upon a time", "--max-tokens", "4", "--temperature", "0", "--threads", "1"]
    done = subprocess.run(
        [str(COMMAND), *words], env=clean_environment(), capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stderr == ""
