"""What is read out of Serve's answer."""

from __future__ import annotations

from typing import Any

import pytest

import actors.ray_shells.serve_state as serve_state
from actors.ray_shells.serve_state import check_route_is_free, served_applications
from cluster.control.presence import ServedApplication
from cluster.errors import ConfigError, Unavailable


class _Controller:
    """Stands for Serve's controller. `answer` None: it does not."""

    def __init__(self, answer: dict[str, Any] | None) -> None:
        self.get_serve_instance_details = self
        self._answer = answer

    def remote(self) -> dict[str, Any] | None:
        return self._answer


@pytest.fixture
def _ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(answer: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        if answer is None:
            raise serve_state.RayError("it restarts")
        return answer

    monkeypatch.setattr("ray.get", get)


def _application(status: str, route: str | None) -> dict[str, Any]:
    return {"status": status, "deployments": {"AttentionWorker": {}}, "route_prefix": route}


def _serve_says(monkeypatch: pytest.MonkeyPatch, controller: _Controller | None) -> None:
    def find(name: str, namespace: str) -> _Controller:
        if controller is None:
            raise ValueError("no actor")
        return controller

    monkeypatch.setattr("ray.get_actor", find)


@pytest.mark.usefixtures("_ray")
def test_no_controller_is_no_application_and_no_answer_is_no_knowledge(monkeypatch: pytest.MonkeyPatch) -> None:
    _serve_says(monkeypatch, None)
    assert served_applications() == {}
    _serve_says(monkeypatch, _Controller(None))
    with pytest.raises(Unavailable):
        served_applications()
    _serve_says(monkeypatch, _Controller({"applications": {"a": _application("RUNNING", "/a")}}))
    assert served_applications() == {"a": ServedApplication("RUNNING", frozenset({"AttentionWorker"}), "/a")}


@pytest.mark.usefixtures("_ray")
def test_a_route_of_another_application_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    running = {
        "a": _application("RUNNING", "/"),
        "b": _application("DELETING", "/b"),
        "c": _application("RUNNING", None),
    }
    _serve_says(monkeypatch, _Controller({"applications": running}))
    with pytest.raises(ConfigError, match=r"'a' answers at / .*route_prefix"):
        check_route_is_free("/", served_as="second")
    check_route_is_free("/", served_as="a")
    check_route_is_free("/b", served_as="second")
