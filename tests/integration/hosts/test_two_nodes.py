"""Two Ray nodes that share no memory, made by deploy/local_cluster.py: worker on one, expert host on the other."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from identity import Case, Reference, assert_identical
from live_server import COMMAND, free_port, poll
from model_builders import DEMO

from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.loadgen.prompts import BUNDLED_PROMPTS

pytestmark = pytest.mark.ray

_SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "local_cluster.py"
_CONFIG = """
model: {dtype: float32}
experts: {hosts: 1}
ray: {worker_resources: {node-1: 1}, host_resources: {node-2: 1}}
"""


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local_cluster", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _can_make_namespaces() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "moesaic-probe"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", "moesaic-probe"], capture_output=True)
    return made


class _Nodes:
    """The cluster, and a client inside its first node."""

    def __init__(self, script: ModuleType, cluster: Any, port: int) -> None:
        self.script, self.cluster, self.port = script, cluster, port

    def inside(self, *command: str) -> list[str]:
        return [sys.executable, str(_SCRIPT), "run", "--node", "1", "--state", str(self.cluster.state), "--", *command]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        url = f"http://127.0.0.1:{self.port}{path}"
        data = [] if body is None else ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        done = subprocess.run(self.inside("curl", "-s", "-m", "90", url, *data), capture_output=True)
        with contextlib.suppress(ValueError):  # a proxy's error page
            return json.loads(done.stdout)
        return None


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Nodes]:
    if not _can_make_namespaces() or shutil.which("curl") is None:
        pytest.skip("network namespaces need root, iproute2 and nsenter (and the test curl)")
    root = tmp_path_factory.mktemp("nodes")
    (root / "config.yaml").write_text(_CONFIG)
    script, port = _load_script(), free_port()
    cluster = script.up(root / "state", 2, 2)
    nodes = _Nodes(script, cluster, port)
    flags = ["--ray-address", cluster.address, "--config", str(root / "config.yaml"), "--port", str(port)]
    try:
        with (root / "log").open("wb") as log:
            server = subprocess.Popen(
                nodes.inside(str(COMMAND), "serve", *flags), stdout=log, stderr=subprocess.STDOUT, cwd=root
            )
        poll(
            lambda: server.poll() is not None or (nodes.ask("/ready") or {}).get("phase") == "ready",
            deadline_s=180,
            what=lambda: (root / "log").read_text(),
            every_s=1,
        )
        assert server.poll() is None, (root / "log").read_text()
        yield nodes
    finally:
        script.down(cluster)
    server.wait(30)


def test_worker_and_host_on_two_nodes_answer_as_transformers_over_grpc(nodes: _Nodes) -> None:
    tokenizer = Tokenizer.load(DEMO)
    cases = [Case(str(i), tuple(tokenizer.encode(text))[:40], 24) for i, text in enumerate(BUNDLED_PROMPTS[:4])]
    answers: list[list[int]] = []
    for case in cases:
        body = {"model": "moesaic-demo", "prompt": list(case.prompt_ids), "max_tokens": 24, "temperature": 0}
        answer = nodes.ask("/v1/completions", {**body, "return_token_ids": True})
        assert answer is not None
        answers.append(answer["choices"][0]["token_ids"])

    status = nodes.ask("/status")
    assert status is not None
    (worker,) = status["workers"]
    assert worker["data_plane"]["carriers"] == ["grpc"], "chosen by itself: the nodes share no memory"
    assert worker["data_plane"]["fallbacks"] < worker["data_plane"]["frames"] / 10, "here only what was late there"
    assert worker["degraded"] == [], "statistics reach the other node, too"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert_identical(Reference(DEMO), cases, answers)
    torch.set_num_threads(before)


def test_host_that_is_cut_off_costs_time_and_no_request(nodes: _Nodes) -> None:
    body = {"model": "moesaic-demo", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    before = nodes.ask("/v1/completions", body)
    nodes.script.set_link(nodes.cluster, 2, is_up=False)
    try:
        # The front end may have been there, too: then Serve starts another one first.
        during = poll(lambda: nodes.ask("/v1/completions", body), deadline_s=90, what="an answer", every_s=1)
    finally:
        nodes.script.set_link(nodes.cluster, 2, is_up=True)

    assert before is not None
    assert during["choices"][0]["text"] == before["choices"][0]["text"]
