"""Fixtures of tests of the expert memory: one file of experts, and stores over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from expert_builders import ExpertFile, open_store, write_experts
from held_stores import LAYERS, NUM_EXPERTS

from actors.experts.memory.store import ExpertStore


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), layers=LAYERS, num_experts=NUM_EXPERTS)


@pytest.fixture
def opened(experts: ExpertFile) -> Iterator[Callable[..., ExpertStore]]:
    stores: list[ExpertStore] = []

    def make(**kwargs: Any) -> ExpertStore:
        stores.append(open_store(experts, **kwargs))
        return stores[-1]

    yield make
    for store in stores:
        store.close()
