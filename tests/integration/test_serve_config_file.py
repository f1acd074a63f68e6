"""`ray start --head` and `serve deploy deploy/serve-config.yaml`: the same system without our command."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import yaml
from answer_watch import AnswerWatch
from live_server import LiveServer, clean_environment, end_all, free_port, make_root, poll

from cluster.frontend.proxy_answers import PROXY_ENVIRONMENT
from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.ray

FILE = Path(__file__).parents[2] / "deploy" / "serve-config.yaml"
BIN = Path(sys.executable).parent


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[LiveServer]:
    """The system of the file on a port of its own, in float32 to compare its texts."""
    tree = yaml.safe_load(FILE.read_text())
    port, grpc_port, dashboard = free_port(), free_port(), free_port()
    tree["http_options"]["port"] = port
    tree["applications"][0]["args"]["grpc"] = {"port": grpc_port}
    tree["applications"][0]["args"]["model"]["dtype"] = "float32"
    config = tmp_path / "serve-config.yaml"
    config.write_text(yaml.safe_dump(tree))
    root = make_root()
    environment = clean_environment(
        RAY_TMPDIR=str(root),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        **PROXY_ENVIRONMENT,
    )
    # Every port that has a default, so that this Ray can live beside another.
    options = {
        "port": free_port(),
        "ray-client-server-port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "object-store-memory": 2**28,
    }
    head = [str(BIN / "ray"), "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            head, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    live = LiveServer(process, port, root, grpc_port)
    try:
        deploy = [str(BIN / "serve"), "deploy", "--address", f"http://127.0.0.1:{dashboard}", str(config)]

        def is_deployed() -> bool:
            assert process.poll() is None, live.log
            run = subprocess.run(deploy, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
            (root / "log").open("a").write(run.stdout + run.stderr)
            return run.returncode == 0

        poll(is_deployed, deadline_s=120, what=lambda: f"serve deploy; its log:\n{live.log}", every_s=1)
        answers = AnswerWatch(live.port)
        with answers:
            live.wait_ready()
        answers.assert_all_ours()
        yield live
    finally:
        end_all(root)
        process.wait(10)
        shutil.rmtree(root, ignore_errors=True)


def _text(server: LiveServer) -> str:
    body = {
        "model": "moesaic-demo",
        "messages": [{"role": "user", "content": "What is 12 + 30?"}],
        "max_tokens": 48,
        "temperature": 0,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
    return answer["choices"][0]["message"]["content"]


def _grpc_text(server: LiveServer) -> str:
    messages = [pb.ChatMessage(role="user", content="What is 12 + 30?")]
    request = pb.GenerateRequest(
        prompt=pb.Prompt(chat=pb.Chat(messages=messages)),
        sampling=pb.SamplingOptions(max_tokens=48, temperature=0),
    )
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        answer = GenerationServiceStub(channel).Generate(request, timeout=120, wait_for_ready=True)
    return answer.choices[0].text


def test_config_file_serves_what_the_command_serves(server: LiveServer, deployed: LiveServer) -> None:
    assert _text(deployed) == _text(server) == _grpc_text(deployed)
    worker, ours = deployed.worker(), server.worker()
    same = ("phase", "model", "dtype", "max_model_len", "kv_blocks_total", "degraded")
    assert {name: worker[name] for name in same} == {name: ours[name] for name in same}
