"""Applications that come, go, come back and live side by side on one Ray, deployed by Serve's own command.

One Ray for all, and one test after the other goes on with what the last one left.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from live_server import free_port, poll, processes_of
from model_builders import build_checkpoint
from ray_head import RayHead, running_ray_head

from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.ray

_ENDS_WITHIN_S = 60.0
_PROMPT = "What is 12 + 30?"


@dataclass
class _Applications:
    """What is deployed: applications by their name in Serve."""

    head: RayHead
    http_port: int
    tree_by_name: dict[str, dict[str, Any]]

    def deploy(self, *names: str) -> None:
        applications = [self.tree_by_name[name] for name in names]
        http = {"host": "127.0.0.1", "port": self.http_port, "request_timeout_s": 630}
        self.head.deploy({"proxy_location": "EveryNode", "http_options": http, "applications": applications})

    def add(self, name: str, prefix: str, model: str, **sections: dict[str, Any]) -> None:
        args = {
            "model": {"path": model, "dtype": "float32", "max_model_len": 128},
            "attention": {"threads": 1, "kv_cache": "16MiB"},
            "grpc": {"port": free_port()},
            "scheduler": {"routing": "least-loaded"},
        }
        for section, fields in sections.items():
            args[section] = args.get(section, {}) | fields
        tree = {"name": name, "route_prefix": prefix, "import_path": "cluster.app:build", "args": args}
        self.tree_by_name[name] = tree

    def texts(self, name: str) -> tuple[str, str]:
        """The same prompt's answers over HTTP and gRPC; they wait until the application answers."""
        tree = self.tree_by_name[name]
        url = f"http://127.0.0.1:{self.http_port}{tree['route_prefix'].rstrip('/')}"

        def over_http() -> str | None:
            body = {"prompt": _PROMPT, "max_tokens": 16, "temperature": 0}
            try:
                models = httpx.get(f"{url}/v1/models", timeout=30)
                if models.status_code != 200:
                    return None
                body["model"] = models.json()["data"][0]["id"]
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            except httpx.TransportError:
                return None
            return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None

        def over_grpc() -> str | None:
            sampling = pb.SamplingOptions(max_tokens=16, temperature=0)
            request = pb.GenerateRequest(prompt=pb.Prompt(text=_PROMPT), sampling=sampling)
            with grpc.insecure_channel(f"127.0.0.1:{tree['args']['grpc']['port']}") as channel:
                try:
                    return GenerationServiceStub(channel).Generate(request, timeout=60).choices[0].text
                except grpc.RpcError:
                    return None

        def wait(look: Callable[[], str | None], over: str) -> str:
            what = f"{name} over {over}"
            return poll(look, deadline_s=240, what=lambda: f"{what}; {self.head.log}", every_s=0.5) or ""

        return wait(over_http, "HTTP"), wait(over_grpc, "gRPC")

    def actors(self, application: str, kind: str = "") -> set[str]:
        """Names of the detached actors of an application, in any namespace."""
        names = {name for _, name in self.head.detached_actors()}
        return {name for name in names if name.startswith(f"{application}/{kind}")}


@pytest.fixture(scope="module")
def applications(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Applications]:
    with running_ray_head() as head:
        yield _Applications(head, free_port(), {})


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


def test_grpc_answers_again_after_serve_was_shut_down_and_the_application_deployed_again(
    applications: _Applications,
) -> None:
    hosts = {"hosts": 1, "host_threads": 1}
    applications.add("first", "/", "moesaic-demo", experts=hosts)
    applications.deploy("first")
    over_http, over_grpc = applications.texts("first")
    assert over_http == over_grpc

    applications.head.shut_down_serve()
    applications.deploy("first")
    assert applications.texts("first") == (over_http, over_grpc)


def test_two_applications_answer_with_their_own_models_and_a_second_of_the_same_name_is_refused(
    applications: _Applications, other_model: Path
) -> None:
    other, head = str(other_model), applications.head
    applications.add("second", "/second", other, ray={"application": "second"})
    applications.add("abroad", "/abroad", other, ray={"namespace": "abroad"})
    applications.add("same-name", "/same-name", other)
    first_port = applications.tree_by_name["first"]["args"]["grpc"]["port"]
    applications.add("same-port", "/same-port", other, ray={"application": "third"}, grpc={"port": first_port})
    before = applications.actors("moesaic")
    applications.deploy("first", "second", "abroad", "same-name", "same-port")

    assert "ray.application" in head.wait_for("same-name", "DEPLOY_FAILED")["message"]
    assert f"grpc.port {first_port}" in head.wait_for("same-port", "DEPLOY_FAILED")["message"]
    first, second, abroad = (applications.texts(name) for name in ("first", "second", "abroad"))
    assert first[0] == first[1]
    assert second[0] == second[1] == abroad[0] == abroad[1] != first[0]
    assert before <= applications.actors("moesaic"), "the first one's are untouched"


def test_actors_of_an_application_that_is_removed_end_and_others_stay(applications: _Applications) -> None:
    head = applications.head
    assert head.num_processes("valkey-server") == 3
    first = {(space, name) for space, name in head.detached_actors() if (space, name[:8]) == ("moesaic", "moesaic/")}
    [controller] = [p for p in processes_of(head.root) if "ServeController" in " ".join(p.cmdline())]
    os.kill(controller.pid, signal.SIGKILL)  # it comes back; meanwhile nothing is known, and nothing ends

    applications.deploy("first")

    left = poll(
        lambda: head.num_processes("valkey-server") == 1 and head.detached_actors(),
        deadline_s=2 * _ENDS_WITHIN_S,
        what=lambda: f"the end of all but the first's; there are {head.detached_actors()}",
        every_s=1,
    )
    assert {each for each in left if not each[1].startswith(("second/", "third/")) and each[0] == "moesaic"} == first
    poll(
        lambda: {each for each in head.detached_actors() if "/" in each[1]} == first,
        deadline_s=_ENDS_WITHIN_S,
        what=lambda: f"no other application's actors; there are {head.detached_actors() - first}",
        every_s=1,
    )
    assert len(list(head.root.glob("moesaic-valkey-*"))) == 1
    over_http, over_grpc = applications.texts("first")
    assert over_http == over_grpc


def test_a_redeployment_replaces_the_hosts_of_another_configuration_and_keeps_the_statistics(
    applications: _Applications,
) -> None:
    hosts, valkey = applications.actors("moesaic", "expert-host"), applications.actors("moesaic", "valkey")
    over_http, _ = applications.texts("first")
    applications.tree_by_name["first"]["args"]["experts"]["io_threads"] = 2
    applications.deploy("first")
    applications.head.wait_for("first", "RUNNING")

    assert applications.texts("first") == (over_http, over_http)
    replaced = applications.actors("moesaic", "expert-host")
    assert len(replaced) == len(hosts) == 1
    assert replaced != hosts
    assert applications.actors("moesaic", "valkey") == valkey


def test_nothing_is_left_after_serve_was_shut_down(applications: _Applications) -> None:
    head = applications.head
    head.shut_down_serve()
    poll(
        lambda: not head.num_processes("valkey-server") and not head.detached_actors(),
        deadline_s=_ENDS_WITHIN_S,
        what=lambda: f"the end of all actors; there are {head.detached_actors()}",
        every_s=1,
    )
    assert not list(head.root.glob("moesaic-valkey-*"))
