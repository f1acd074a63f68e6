"""Experts move between hosts while an engine steps: not a token changes, whatever happens on the way.

Hosts run in threads of this process and are called directly; benchmark `migration` has real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from direct_hosts import DirectHosts
from identity import Case, Reference, assert_identical, demo_cases, engine_parts, expert_hosts, greedy
from live_server import poll
from model_builders import DEMO

from actors.engine.loaded_engine import LoadedEngine
from actors.expert_client.dispatch import HostDispatcher
from actors.expert_host.host import ExpertHost
from cluster.control.migrator import MigrationRunner
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.placement.migration import CommandKind, MigrationPhase
from cluster.placement.plan import Placement
from cluster.placement.stages import experts_of
from cluster.types import ExpertId, GenerationRequest, RequestId

pytestmark = pytest.mark.usefixtures("patient")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(DEMO)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return demo_cases(Tokenizer.load(DEMO).encode, num_domains=6, prompts_per_domain=1)


@dataclass
class Rig:
    """Hosts, an engine over them, and what moves experts between them. Steps and migration take turns."""

    control: DirectHosts
    hosts: list[ExpertHost]
    parts: LoadedEngine
    runner: MigrationRunner

    @property
    def dispatcher(self) -> HostDispatcher:
        assert isinstance(self.parts.dispatcher, HostDispatcher)
        return self.parts.dispatcher

    def start(self, owned: Mapping[int, Mapping[int, tuple[int, ...]]]) -> None:
        backend = self.hosts[0].backend
        assert backend is not None
        capacities = {i: host.report().capacity for i, host in enumerate(self.hosts)}
        target = Placement(epoch=0, hosts=owned)
        assert self.runner.start(target, capacities=capacities, expert_bytes=backend.store.slot_bytes)

    def answer(self, cases: list[Case], at_step: Mapping[int, Callable[[], None]]) -> list[list[int]]:
        """Greedy answers to all cases at once, again and again until the migration is over and all are answered."""
        answers: dict[str, list[int]] = {}
        engine = self.parts.engine
        for step in range(5000):
            if not engine.has_work:
                if step > max(at_step, default=0) and not self.runner.turn():
                    break
                answers = {case.name: [] for case in cases}
                for case in cases:
                    request_id = RequestId(case.name)
                    engine.add(
                        GenerationRequest(request_id=request_id, prompt_ids=case.prompt_ids, sampling=greedy(case))
                    )
            at_step.get(step, lambda: None)()
            self.runner.turn()
            for output in engine.step():
                assert output.error is None
                answers[output.request_id].append(output.token_id)
        return list(answers.values())


@contextmanager
def _rig(num_hosts: int, *, spares: int = 0, bytes_per_s: float = 1e9, host_cache: str = "auto") -> Iterator[Rig]:
    control = DirectHosts()
    with (
        expert_hosts(DEMO, num_hosts, spares=spares, host_cache=host_cache, peers=control) as hosts,
        engine_parts(DEMO, cache="0", hosts=hosts[:num_hosts]) as parts,
    ):
        control.hosts = hosts
        links = parts.links
        assert links is not None
        links._locate = lambda index: hosts[index].endpoint()
        runner = MigrationRunner(
            control,
            Placement(epoch=1, hosts={i: host.owned for i, host in enumerate(hosts[:num_hosts])}),
            on_publish=links.set_placement,
            worker_epochs=lambda: {"worker": links.epoch},
            bytes_per_s=bytes_per_s,
        )
        yield Rig(control, hosts, parts, runner)


def _rotated(hosts: list[ExpertHost], layers: int = 4) -> dict[int, Mapping[int, tuple[int, ...]]]:
    """Of the first layers every host gets what the next one had."""
    some = sorted(hosts[0].owned)[:layers]
    return {
        i: {layer: (hosts[(i + 1) % len(hosts)] if layer in some else host).owned[layer] for layer in host.owned}
        for i, host in enumerate(hosts)
    }


def _in_memory(host: ExpertHost, placement: Placement, index: int) -> bool:
    assert host.backend is not None
    store = host.backend.store
    return all(store.resident(expert.layer)[expert.expert] for expert in experts_of(placement, index))


def test_migration_under_load_changes_no_token_and_moves_what_was_planned(
    reference: Reference, cases: list[Case]
) -> None:
    with _rig(2) as rig:
        rig.answer(cases[:2], {})  # warm: what is owned is in memory
        target = _rotated(rig.hosts, layers=2)
        before = rig.dispatcher.counters.frames

        answers = rig.answer(cases, {3: lambda: rig.start(target)})

        status = rig.runner.status()
        assert (status.phase, status.reason) == (MigrationPhase.DONE, "")
        assert status.moved_bytes == status.planned_bytes > 0
        placement = rig.runner.placement
        assert {i: dict(owned) for i, owned in placement.hosts.items()} == {i: dict(o) for i, o in target.items()}
        assert placement.epoch > 2, "in several epochs: an eighth of what a host owns fits beside it"
        assert [host.epochs().taken for host in rig.hosts] == [(placement.epoch,)] * 2
        assert all(_in_memory(host, placement, i) for i, host in enumerate(rig.hosts))
        assert rig.control.fetched, "from the other host's memory, where that is quicker"
        counters = rig.dispatcher.counters
        assert counters.frames > before
        assert (counters.fallbacks, rig.dispatcher.links.num_lost) == (0, 0)
        again = rig.answer(cases, {})
        assert set(rig.dispatcher.links.routes.epochs) == {placement.epoch}
    assert_identical(reference, cases, answers)
    assert_identical(reference, cases, again)


def test_host_joins_takes_half_and_another_leaves(reference: Reference, cases: list[Case]) -> None:
    some = cases[:4]
    with _rig(2, spares=1, host_cache="75%") as rig:
        layers = sorted(rig.hosts[0].owned)
        everything = {layer: tuple(sorted(rig.hosts[0].owned[layer] + rig.hosts[1].owned[layer])) for layer in layers}
        odd = {layer: experts if place % 2 else () for place, (layer, experts) in enumerate(everything.items())}
        even = {layer: () if place % 2 else experts for place, (layer, experts) in enumerate(everything.items())}

        answers = rig.answer(some, {2: lambda: rig.start({1: odd, 2: even})})

        assert rig.runner.status().phase is MigrationPhase.DONE
        assert rig.dispatcher.links.carriers == ("shared memory",) * 2
        assert rig.hosts[0].owned == {} or not any(rig.hosts[0].owned.values())
        rig.hosts[0].stop()  # it is empty: nobody notices
        num_frames = rig.hosts[2].status().num_frames
        again = rig.answer(some, {})
        assert rig.hosts[2].status().num_frames > num_frames
        assert (rig.dispatcher.counters.fallbacks, rig.dispatcher.links.num_lost) == (0, 0)
    assert_identical(reference, some, answers)
    assert_identical(reference, some, again)


def test_replicas_share_the_work_and_stand_in_for_a_lost_host(reference: Reference, cases: list[Case]) -> None:
    some = cases[:4]
    with _rig(2, host_cache="100%") as rig:
        layers = rig.hosts[0].owned
        everything = {layer: tuple(sorted(layers[layer] + rig.hosts[1].owned[layer])) for layer in layers}
        rig.answer(some[:1], {1: lambda: rig.start({0: everything, 1: everything})})
        assert rig.dispatcher.links.routes.has_replicas
        rows = [host.status().num_rows for host in rig.hosts]

        answers = rig.answer(some, {6: rig.hosts[1].stop})

        assert all(host.status().num_rows > before for host, before in zip(rig.hosts, rows, strict=True))
        assert rig.dispatcher.counters.fallbacks == 0, "the other one has everything"
    assert_identical(reference, some, answers)


@pytest.mark.parametrize("fault", ["lost", "damaged"])
def test_fault_while_preparing_gives_the_migration_up_and_no_request(
    reference: Reference, cases: list[Case], fault: str
) -> None:
    some = cases[:3]
    with _rig(2, bytes_per_s=2e5) as rig:
        rig.answer(some[:1], {})
        owned = [host.owned for host in rig.hosts]

        def break_it() -> None:
            if fault == "lost":
                rig.control.away.add(1)
                rig.hosts[1].stop()
                for command in [command for command in rig.control.told if command.host == 0]:
                    assert command.kind is CommandKind.PREPARE
                rig.runner._clock = lambda: rig.runner._began_s + 10.0  # longer than it is waited for
            else:
                rig.control.damaged.add(1)

        answers = rig.answer(some, {2: lambda: rig.start(_rotated(rig.hosts)), 4: break_it})

        status = rig.runner.status()
        assert status.phase is MigrationPhase.ABORTED
        assert ("host 1 was lost" if fault == "lost" else "checksum") in status.reason
        assert rig.runner.placement.epoch == 1
        assert rig.hosts[0].owned == owned[0]
        assert rig.hosts[0].epochs().taken == (1,), "nothing prepared is left behind"
    assert_identical(reference, some, answers)


def test_strays_do_not_drive_out_what_a_host_owns(cases: list[Case]) -> None:
    with _rig(2) as rig:
        host, other = rig.hosts
        assert host.backend is not None
        store = host.backend.store
        placement = Placement(epoch=1, hosts={0: host.owned})
        poll(lambda: _in_memory(host, placement, 0), deadline_s=30, what="what it owns in memory")
        for layer, experts in other.owned.items():
            for expert in experts:
                list(store.acquire(layer, [expert]))
        assert store.num_resident == store.num_slots
        assert _in_memory(host, placement, 0)


def test_bytes_of_an_expert_are_the_same_everywhere() -> None:
    with _rig(2, host_cache="100%") as rig:
        first, second = rig.hosts
        expert = ExpertId(min(first.owned), 0)
        for host in rig.hosts:
            assert host.backend is not None
            list(host.backend.store.acquire(expert.layer, [expert.expert]))
        data, checksum = first.expert_bytes(first._form, expert)
        assert second.checksums(second._form, [expert]) == {expert: checksum}
        assert data.dtype == np.uint8
        assert data.any()
