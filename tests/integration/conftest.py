"""One server for all tests that leave it as they found it. float32, so that texts do not depend on the batch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from live_server import LiveServer, running_server
from model_builders import DEMO


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    with running_server("--dtype", "float32") as live:
        yield live


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120) as openai_client:
        yield openai_client


@pytest.fixture(scope="module")
def demo() -> Iterator[Path]:
    """The demo model, in memory where that can be: small caches read 10 GB, and a slow disk adds nothing to a proof."""
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK) or shutil.disk_usage(shared_memory).free < 2**27:
        yield DEMO
        return
    copy = Path(tempfile.mkdtemp(prefix="moesaic-demo-", dir=shared_memory))
    try:
        yield shutil.copytree(DEMO, copy, dirs_exist_ok=True)
    finally:
        shutil.rmtree(copy)
