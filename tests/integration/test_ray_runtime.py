"""How Ray is started: which cluster, and only if none is named."""

from __future__ import annotations

from typing import Any

import pytest

from actors.ray_runtime import RayRuntime
from cluster.application import ApplicationId

pytestmark = pytest.mark.slow  # Ray Serve takes seconds to import


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.init", lambda **options: calls.append(options))
    return calls


def test_a_ray_of_our_own_never_joins_one_found_on_the_machine(started: list[dict[str, Any]]) -> None:
    RayRuntime(address=None, application=ApplicationId("n", "a"), environment={})

    assert started[0]["address"] == "local"


def test_a_named_cluster_is_joined_without_options_of_its_own_start(started: list[dict[str, Any]]) -> None:
    RayRuntime(address="10.0.0.1:6379", application=ApplicationId("n", "a"), environment={})

    assert started[0]["address"] == "10.0.0.1:6379"
    assert "object_store_memory" not in started[0]
