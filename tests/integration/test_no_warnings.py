"""A normal run says nothing that is not ours: no library warns, of whatever it will do one day."""

from __future__ import annotations

import subprocess

import pytest
from live_server import COMMAND, clean_environment

pytestmark = pytest.mark.slow


def test_a_command_that_computes_prints_its_answer_alone() -> None:
    words = ["generate", "--prompt", "Once upon a time", "--max-tokens", "4", "--temperature", "0", "--threads", "1"]
    done = subprocess.run(
        [str(COMMAND), *words], env=clean_environment(), capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stderr == ""
