"""Experts from another node's memory: two Ray nodes of one machine, a shelf on the second, a store on the first.

The nodes' object stores are apart; what the first node needs goes through Ray's object transfer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import ray
import torch
from identity import Reference, assert_identical, demo_cases, engine_parts, generate_greedy
from live_server import poll
from model_builders import DEMO
from ray.cluster_utils import Cluster

from actors.experts.memory.arena import RamArena
from actors.experts.memory.disk import DiskLink
from actors.experts.memory.shelves import ShelfFacts, ShelfLink, remote_source
from actors.experts.memory.store import ExpertStore, LinkFactory
from actors.model.checkpoint import LoadedModel, load_model
from actors.ray_shells.shelf_actor import RayShelves, expert_shelves, start_shelves
from actors.weights.formats.expert import ExpertWeights
from actors.weights.reader import ExpertReader
from actors.weights.slots import SlotForm
from cluster.application import ApplicationId
from cluster.config.load import MoesaicConfig, load_config
from cluster.deployed_spec import specify
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.model.info import ModelInfo, read_model_info
from cluster.policies.eviction.lru import LruScorer
from cluster.types import Tier

pytestmark = pytest.mark.ray

_NAMESPACE = "remote-tier"
_APPLICATION = ApplicationId(_NAMESPACE, "moesaic")
_HEALTH = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "5", "initial_delay_ms": "1000"}
_FILL_DEADLINE_S = 90.0  # a process that imports transformers


def _config(remote_tier: str) -> MoesaicConfig:
    return load_config(
        None,
        {
            "model": {"path": str(DEMO), "dtype": "float32"},
            "experts": {"remote_tier": remote_tier},
            "ray": {"namespace": _NAMESPACE, "worker_resources": {"compute": 1}},
        },
    )


@dataclass
class _Nodes:
    """Two nodes, and the model of which the second keeps experts for the first."""

    cluster: Cluster
    second: Any
    info: ModelInfo
    model: LoadedModel
    form: SlotForm
    shelves: RayShelves

    def start(self, remote_tier: str) -> tuple[str, ...]:
        config = _config(remote_tier)
        return start_shelves(specify(config, None))

    def filled(self) -> ShelfFacts:
        """The one shelf, when it has taken in all it will."""
        facts = poll(
            lambda: [each for each in self.shelves.facts() if each.is_complete],
            deadline_s=_FILL_DEADLINE_S,
            what=lambda: f"a full shelf; there is {self.shelves.facts()}",
            every_s=0.5,
        )
        assert len(facts) == 1
        return facts[0]

    def store(self, sources: Sequence[LinkFactory], slots: int) -> tuple[ExpertStore, ExpertReader]:
        """An expert memory with the disk behind `sources`."""
        form = _form(self.model)
        reader = ExpertReader({part.file for expert in form.layout.experts.values() for part in expert.parts})
        disk = partial(DiskLink, reader, form)
        budget_bytes = slots * form.slot_bytes
        return ExpertStore(form, LruScorer(form.grid.size), [*sources, disk], budget_bytes=budget_bytes), reader


@pytest.fixture(scope="module")
def nodes() -> Iterator[_Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _HEALTH.items():  # a dead node is noticed after 15 s
            patch.setenv(f"RAY_health_check_{name}", value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "resources": {"compute": 1}}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
        try:
            second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
            ray.init(address=cluster.address, namespace=_NAMESPACE, log_to_driver=False, logging_level="ERROR")
            info = read_model_info(_config("0").model)
            model = load_model(info, "float32", dense=False)
            yield _Nodes(cluster, second, info, model, _form(model), RayShelves(_APPLICATION))
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_the_other_node_has_the_one_shelf_and_it_stays_for_who_asks_for_the_same(nodes: _Nodes) -> None:
    first = nodes.start("5%")
    held = nodes.filled()

    assert first == (nodes.second.node_id,), "nothing that computes can be placed there; here there can"
    assert held.node_id == nodes.second.node_id
    assert held.num_held == nodes.form.grid.size * 5 // 100, "no more than its bytes, no less than fit"
    assert held.problem is None
    assert nodes.start("5%") == first
    assert nodes.filled().shelf_id == held.shelf_id


def test_a_shelf_of_another_size_takes_its_place(nodes: _Nodes) -> None:
    nodes.start("5%")
    before = nodes.filled().shelf_id
    nodes.start("100%")
    poll(lambda: [f for f in nodes.shelves.facts() if f.shelf_id != before], deadline_s=60, what="another", every_s=0.5)

    assert nodes.filled().num_held == nodes.form.grid.size


def test_experts_come_from_the_other_node_with_the_bytes_of_the_file_and_after_its_death_from_disk(
    nodes: _Nodes,
) -> None:
    nodes.start("100%")
    nodes.filled()
    links: list[ShelfLink] = []

    make = remote_source(nodes.shelves, fingerprint=nodes.info.fingerprint, load_timeout_s=60)

    def source(arena: RamArena) -> ShelfLink:
        links.append(make(nodes.form, arena))
        return links[-1]

    num_experts, layers = nodes.form.grid.num_experts, nodes.form.grid.layers
    truth, _ = nodes.store([], slots=num_experts)
    store, reader = nodes.store([source], slots=num_experts)
    poll(lambda: links[0].num_experts == nodes.form.grid.size, deadline_s=30, what="the table of the other node")

    _assert_equal(store, truth, layers[0], range(num_experts))
    assert reader.bytes_read == 0, "this node's disk was left alone"
    assert store.counters.bytes_moved[Tier.REMOTE] == num_experts * nodes.form.slot_bytes
    assert store.counters.misses[Tier.REMOTE].sum() == num_experts

    nodes.cluster.remove_node(nodes.second, allow_graceful=False)
    _assert_equal(store, truth, layers[1], range(num_experts))
    assert reader.bytes_read > 0
    poll(lambda: links[0].num_experts == 0, deadline_s=60, what="an empty table")
    store.close()
    truth.close()


def test_without_another_node_there_is_no_shelf_and_stopping_none_is_no_error(nodes: _Nodes) -> None:
    if nodes.second in nodes.cluster.worker_nodes:
        nodes.cluster.remove_node(nodes.second, allow_graceful=False)
    poll(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, deadline_s=60, what="the death of the second node")

    assert nodes.start("100%") == ()
    shelves = expert_shelves(_APPLICATION)
    shelves.end()
    assert shelves.list_keys() == ()
    with pytest.raises(ValueError, match="no actor"):
        shelves.find(nodes.second.node_id)


def _form(model: LoadedModel) -> SlotForm:
    return SlotForm(model.layout, torch.bfloat16, top_k=model.top_k)  # held as stored


def _assert_equal(store: ExpertStore, truth: ExpertStore, layer: int, experts: Sequence[int]) -> None:
    wanted = dict(pair for group in truth.acquire(layer, experts) for pair in group)
    seen: set[int] = set()
    for group in store.acquire(layer, experts):
        for expert, weights in group:
            assert all(map(torch.equal, _tensors(weights), _tensors(wanted[expert]))), (layer, expert)
            seen.add(expert)
    assert seen == set(experts)


def _tensors(weights: ExpertWeights) -> list[torch.Tensor]:
    assert weights.up is not None
    return [weights.gate.data, weights.up.data, weights.down.data]


def test_answers_are_the_same_from_another_nodes_memory_and_after_its_loss(nodes: _Nodes) -> None:
    nodes.second = nodes.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    nodes.start("100%")
    nodes.filled()
    cases = demo_cases(Tokenizer.load(DEMO).encode, num_domains=4, prompts_per_domain=2)
    half, threads = len(cases) // 2, torch.get_num_threads()
    torch.set_num_threads(1)
    with engine_parts(DEMO, cache="12.5%", experts={"ram_tier": "40%"}, shelves=nodes.shelves) as parts:
        moved = parts.store.counters.bytes_moved

        def loads_from_there() -> bool:
            first.extend(generate_greedy(parts.engine, cases[:half], alone=False))
            return moved[Tier.REMOTE] > 0

        first: list[list[int]] = []
        poll(loads_from_there, deadline_s=60, what="loads from the other node")
        nodes.cluster.remove_node(nodes.second, allow_graceful=False)
        second = generate_greedy(parts.engine, cases[half:], alone=False)
    torch.set_num_threads(threads)

    assert_identical(Reference(DEMO), cases, first[:half] + second)
