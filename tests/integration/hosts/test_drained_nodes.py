"""Expert hosts on several Ray nodes of this machine: spread when a node joins, emptied with one, filled again.

Real hosts, a real scheduler; the one worker is this test, and nobody asks anything.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from live_server import poll
from model_builders import DEMO
from ray import serve
from ray.cluster_utils import Cluster
from scheduler_values import worker_report

from actors.ray_shells.host_actor import start_expert_hosts
from actors.ray_shells.host_calls import expert_hosts
from actors.ray_shells.named_actors import ActorKind, DetachedActors
from actors.ray_shells.scheduler_actor import start_scheduler
from actors.ray_shells.scheduler_client import Claim, agreed_digest
from cluster.config.load import MoesaicConfig, load_config
from cluster.deployed_spec import specify
from cluster.status.scheduler import SchedulerStatus

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(600)]

_NAMESPACE = "drained-nodes"
_STORE_BYTES = 100 * 2**20
_DEADLINE_S = 150.0
NUM_EXPERTS, NUM_LAYERS = 64, 6


@serve.deployment(ray_actor_options={"num_cpus": 0})
class _Nothing:
    """What Serve knows of the application."""


def _config() -> MoesaicConfig:
    return load_config(
        None,
        {
            "model": {"path": str(DEMO)},
            "experts": {"hosts": 3, "host_cache": "100%", "host_threads": 1},
            "scheduler": {"placement_interval_s": 600, "report_interval_s": 0.5},
            "ray": {"namespace": _NAMESPACE},
        },
    )


@dataclass
class _Fleet:
    """The scheduler, and a worker that follows whatever placement it publishes."""

    cluster: Cluster
    scheduler: Any
    claim: Claim
    epoch: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def follow(self) -> None:
        while not self.ended.wait(0.3):
            report = worker_report(
                layers=tuple(range(NUM_LAYERS)),
                num_experts=NUM_EXPERTS,
                node_id="elsewhere",
                placement_epoch=self.epoch,
            )
            told = ray.get(self.scheduler.report_worker.remote(report, self.claim), timeout=30)
            if told.placement is not None:
                self.epoch = told.placement.epoch

    def status(self) -> SchedulerStatus:
        return ray.get(self.scheduler.status.remote(), timeout=30)

    def owned(self) -> dict[str, int]:
        """Experts by node, of hosts that are ready."""
        hosts = [host for host in self.status().hosts if host.phase == "ready"]
        return {node: sum(h.owned or 0 for h in hosts if h.node_id == node) for node in {h.node_id for h in hosts}}

    def until_owned(self, nodes: int, least: int) -> dict[str, int]:
        """Experts by node once so many nodes have hosts with so many each."""
        return poll(
            lambda: (found := self.owned()) and sum(n >= least for n in found.values()) == nodes and found,
            deadline_s=_DEADLINE_S,
            what=lambda: f"{nodes} nodes with {least} experts each; {self.status()}",
            every_s=0.5,
        )


@pytest.fixture(scope="module")
def fleet() -> Iterator[_Fleet]:
    spec = specify(_config(), None)
    schedulers = DetachedActors(spec.application, ActorKind.SCHEDULER)
    head = {"num_cpus": 1, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)
        ray.init(address=cluster.address, namespace=_NAMESPACE, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="Disabled")  # a scheduler ends with Serve's application
        serve.run(_Nothing.bind(), name=spec.application.name, route_prefix=None)
        start_expert_hosts(spec)
        start_scheduler(spec)
        fleet = _Fleet(cluster, schedulers.find(), Claim(spec.application.name, agreed_digest(spec)))
        thread = threading.Thread(target=fleet.follow)
        thread.start()
        yield fleet
        fleet.ended.set()
        thread.join()
    finally:
        if ray.is_initialized():
            schedulers.end()
            expert_hosts(spec.application).end()
            serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def test_hosts_spread_over_a_node_that_joins_and_leave_one_that_is_emptied_and_come_back(fleet: _Fleet) -> None:
    total = NUM_LAYERS * NUM_EXPERTS
    poll(
        lambda: (
            (on_two := fleet.owned()) and len(on_two) == 2 and sum(on_two.values()) == total and min(on_two.values())
        ),
        deadline_s=_DEADLINE_S,
        what=lambda: f"all experts on two nodes; {fleet.status()}",
        every_s=0.5,
    )
    poll(lambda: len(fleet.status().hosts) == 3, deadline_s=_DEADLINE_S, what=lambda: f"three hosts; {fleet.status()}")

    joined = fleet.cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)
    on_three = fleet.until_owned(3, total // 4)
    assert joined.node_id in on_three
    poll(lambda: len(fleet.status().hosts) == 3, deadline_s=_DEADLINE_S, what=lambda: f"three hosts; {fleet.status()}")
    assert len({host.node_id for host in fleet.status().hosts}) == 3, "one, one, one"

    line = ray.get(fleet.scheduler.drain.remote(joined.node_id), timeout=30)
    assert not line.is_empty and line.left
    poll(
        lambda: ray.get(fleet.scheduler.drain.remote(joined.node_id), timeout=30).is_empty,
        deadline_s=_DEADLINE_S,
        what=lambda: f"an empty node; {fleet.status()}",
        every_s=0.5,
    )
    assert fleet.owned().get(joined.node_id, 0) == 0

    ray.get(fleet.scheduler.undrain.remote(joined.node_id), timeout=30)
    back = fleet.until_owned(3, total // 4)
    assert back[joined.node_id] >= total // 4, "at once, and without a gain: nothing was asked of the experts"
