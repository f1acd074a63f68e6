"""Any combination of budgets answers, with the same tokens: memories of workers and hosts, tiers below, shelves.

Everything is in this process: hosts in threads, other nodes' memory as an object.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from identity import Case, Reference, assert_identical, engine_parts, expert_hosts, generate_greedy, random_cases
from model_builders import build_checkpoint

from actors.experts.memory.shelves import ShelfFacts, form_digest
from cluster.model.info import load_model_info

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patient")]

NUM_DRAWN = 10
REPORTED = {"cache": "25%", "host_cache": "50%", "ram_tier": "25%", "hosts": 1}  # RAM no larger than DEVICE
SHARES = ("25%", "50%", "75%", "100%")


class OtherNode:
    """Shelves of one other node that has every other expert, of the model that `store` has."""

    def __init__(self, path: Path) -> None:
        with engine_parts(path) as parts:
            store = parts.store
            list_all = [(layer, range(store.grid.num_experts)) for layer in store.grid.layers]
            self._bytes: dict[int, np.ndarray] = {}
            for layer, experts in list_all:
                for _ in store.acquire(layer, experts):
                    pass
            for index in range(0, store.grid.size, 2):
                data = store.protected.read(index, lambda view: np.frombuffer(view, dtype=np.uint8).copy())
                assert data is not None
                self._bytes[index] = data
            self._form = form_digest(store.form)
        self._fingerprint = load_model_info(str(path), max_model_len=384).fingerprint

    def facts(self) -> Sequence[ShelfFacts]:
        return [
            ShelfFacts(
                shelf_id="s",
                node_id="n",
                fingerprint=self._fingerprint,
                form=self._form,
                num_held=len(self._bytes),
                is_complete=True,
                problem=None,
            )
        ]

    def listing(self, shelf: ShelfFacts, since: int) -> Sequence[tuple[int, object]]:
        return [(index, index) for index in self._bytes][since:]

    def fetch(self, handle: object, timeout_s: float) -> np.ndarray:
        assert isinstance(handle, int)
        return self._bytes[handle]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.fixture(scope="module")
def cases(model: Path) -> list[Case]:
    return random_cases(5, vocab_size=load_model_info(str(model)).vocab_size, max_tokens=12)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def other_node(model: Path) -> OtherNode:
    return OtherNode(model)


def drawn(seed: int) -> dict[str, Any]:
    """One combination; the first is the one that failed every request."""
    if seed == 0:
        return {**REPORTED, "remote_tier": "0"}
    draw = random.Random(seed)
    hosts = draw.choice([0, 1, 1, 2])
    return {
        "hosts": hosts,
        "cache": draw.choice([*SHARES, "0"] if hosts else SHARES),
        "host_cache": draw.choice(SHARES),
        "ram_tier": draw.choice(["0", *SHARES]),
        "remote_tier": draw.choice(["0", "50%"]),
    }


@pytest.mark.parametrize("seed", range(NUM_DRAWN))
def test_any_combination_of_budgets_answers_as_transformers(
    model: Path, cases: list[Case], reference: Reference, other_node: OtherNode, seed: int
) -> None:
    budgets: Mapping[str, Any] = drawn(seed)
    experts = {name: budgets[name] for name in ("ram_tier",)}
    shelves = other_node if budgets["remote_tier"] != "0" else None
    num_hosts = budgets["hosts"]
    with (
        expert_hosts(model, num_hosts, host_cache=budgets["host_cache"], experts=experts) as hosts,
        engine_parts(model, cache=budgets["cache"], hosts=hosts, experts=experts, shelves=shelves) as parts,
    ):
        answers = [
            *generate_greedy(parts.engine, cases, alone=False),
            *generate_greedy(parts.engine, cases, alone=True),
        ]
        assert not parts.engine.has_work
    assert_identical(reference, [*cases, *cases], answers)
