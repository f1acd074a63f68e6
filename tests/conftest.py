"""For every test: nothing is fetched from a model hub, and what takes minutes comes last."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("moesaic", deadline=None)  # a busy machine is no defect
settings.load_profile("moesaic")
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; servers under test inherit it
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # as in actors/ray_shells/runtime.py


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests with servers after the quick ones; `nightly` ones only where -m names them, whatever else -m says."""
    if "nightly" not in config.getoption("markexpr"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch in one thread: tensors of tests are tiny, more threads only wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No host is slow: where a test counts hedged parts, a busy machine must not add to them."""
    from cluster.execution import host_times

    monkeypatch.setattr(host_times, "_LEAST_S", 3600.0)
