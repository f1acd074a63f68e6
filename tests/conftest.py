"""For every test: nothing is fetched from a model hub, and what takes minutes comes last."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; servers under test inherit it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with servers after the quick ones."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
