"""One server for all tests that leave it as they found it. float32, so that texts do not depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from live_server import LiveServer, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    with running_server("--dtype", "float32") as live:
        yield live


@pytest.fixture(scope="session")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120) as openai_client:
        yield openai_client
