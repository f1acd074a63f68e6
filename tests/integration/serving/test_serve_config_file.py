"""`ray start --head` and `serve deploy deploy/serve-config.yaml`: the same system without our command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import yaml
from answer_watch import AnswerWatch
from live_server import LiveServer, free_port
from ray_head import running_ray_head

from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.ray

FILE = Path(__file__).parents[3] / "deploy" / "serve-config.yaml"


@pytest.fixture
def deployed() -> Iterator[LiveServer]:
    """The system of the file on a port of its own, in float32 to compare its texts."""
    tree = yaml.safe_load(FILE.read_text())
    port, grpc_port = free_port(), free_port()
    tree["http_options"]["port"] = port
    tree["applications"][0]["args"]["grpc"] = {"port": grpc_port}
    tree["applications"][0]["args"]["model"]["dtype"] = "float32"
    with running_ray_head() as head:
        head.deploy(tree)
        live = LiveServer(head.process, port, head.root, grpc_port)
        answers = AnswerWatch(live.port)
        with answers:
            live.wait_ready()
        answers.assert_all_ours()
        yield live


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
