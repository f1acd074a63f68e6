"""Experts in other places than the engine: the same tokens, whatever hosts, carriers and memories there are.

Hosts run in threads of this process here; tests/integration/hosts/test_distributed_server.py has real ones.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from identity import (
    Case,
    Reference,
    assert_identical,
    demo_cases,
    engine_parts,
    expert_hosts,
    generate,
    generate_greedy,
    greedy,
    random_cases,
)
from live_server import poll
from model_builders import DEMO, FAMILIES, build_checkpoint

from actors.data_plane.channel import Welcome
from actors.expert_client.dispatch import HostDispatcher
from cluster.errors import ExpertReadError
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.model.info import load_model_info
from cluster.types import GenerationRequest, RequestId, SamplingParams

pytestmark = pytest.mark.usefixtures("patient")

RANDOM_SMALLEST = "0"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo checkpoint, where reading it costs no disk."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else tmp_path_factory.mktemp("demo")
    try:
        yield Path(shutil.copytree(DEMO, root / DEMO.name))
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def demo_reference() -> Reference:
    return Reference(DEMO)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return demo_cases(Tokenizer.load(DEMO).encode, num_domains=8, prompts_per_domain=2)


def _dispatcher(parts: object) -> HostDispatcher:
    dispatcher = parts.dispatcher  # type: ignore[attr-defined]
    assert isinstance(dispatcher, HostDispatcher)
    return dispatcher


@pytest.mark.parametrize("cache", ["0", "25%"])
@pytest.mark.parametrize("num_hosts", [1, 2])
def test_demo_over_hosts_under_16_requests_with_preemption_answers_as_transformers(
    demo: Path, demo_reference: Reference, cases: list[Case], num_hosts: int, cache: str
) -> None:
    with (
        expert_hosts(demo, num_hosts) as hosts,
        engine_parts(demo, cache=cache, kv_blocks=60, max_running=16, hosts=hosts) as parts,
    ):
        answers = generate_greedy(parts.engine, cases, alone=False)

        assert parts.engine.batcher.num_preemptions > 0
        counters = _dispatcher(parts).counters
        assert counters.frames > 0
        assert counters.fallbacks == counters.redispatched == 0
        assert parts.links is not None
        assert parts.links.carriers == ("shared memory",) * num_hosts
        assert (parts.backend is not None and parts.store.num_resident > 0) is (cache == "25%")
        assert all(host.status().num_frames for host in hosts)
    assert_identical(demo_reference, cases, answers)


def test_hosts_that_hold_an_eighth_answer_as_transformers(
    demo: Path, demo_reference: Reference, cases: list[Case]
) -> None:
    some = cases[:6]
    with (
        expert_hosts(demo, 2, host_cache="12.5%") as hosts,
        engine_parts(demo, cache="0", hosts=hosts, carrier="grpc") as parts,
    ):
        answers = generate_greedy(parts.engine, some, alone=False)

        assert parts.links is not None
        assert parts.links.carriers == ("grpc", "grpc")
    assert_identical(demo_reference, some, answers)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_over_two_hosts_answers_as_transformers(tmp_path: Path, family: str) -> None:
    path = build_checkpoint(tmp_path, family)
    prompts = random_cases(6, vocab_size=load_model_info(str(path)).vocab_size)
    with expert_hosts(path, 2) as hosts, engine_parts(path, cache=RANDOM_SMALLEST, hosts=hosts) as parts:
        answers = generate_greedy(parts.engine, prompts, alone=False)

        assert _dispatcher(parts).counters.fallbacks == 0
    assert_identical(Reference(path), prompts, answers)


def test_hosts_give_the_local_log_probabilities(demo: Path, cases: list[Case]) -> None:
    """Nearly: each engine calibrates from how many rows on its dense layers leave the compiled kernels. (That one
    owner gives the local sums to the bit: tests/unit/expert_client/test_remote_dispatch.py.)"""
    params = [SamplingParams(max_tokens=2, temperature=0.0, num_logprobs=20) for _ in cases[:4]]
    with engine_parts(demo) as parts:
        local = generate(parts.engine, cases[:4], params)
    with expert_hosts(demo, 1) as hosts, engine_parts(demo, cache="0", hosts=hosts) as parts:
        remote = generate(parts.engine, cases[:4], params)

    for ours, theirs in zip(remote, local, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.logprob is not None and other.logprob is not None
            assert [token for token, _ in mine.logprob.top] == [token for token, _ in other.logprob.top]
            assert [p for _, p in mine.logprob.top] == pytest.approx([p for _, p in other.logprob.top], abs=1e-3)


def test_lost_host_costs_no_request_and_its_memory_is_given_back_when_it_returns(
    demo: Path, demo_reference: Reference, cases: list[Case]
) -> None:
    some = cases[:4]
    with expert_hosts(demo, 2) as hosts, engine_parts(demo, cache="0", hosts=hosts) as parts:
        dispatcher, engine = _dispatcher(parts), parts.engine
        answers: dict[str, list[int]] = {case.name: [] for case in some}
        for case in some:
            engine.add(
                GenerationRequest(request_id=RequestId(case.name), prompt_ids=case.prompt_ids, sampling=greedy(case))
            )
        for step in range(1000):
            if step == 5:
                hosts[1].stop()
            for output in engine.step():
                answers[output.request_id].append(output.token_id)
            if not engine.has_work:
                break

        assert dispatcher.counters.fallbacks > 0
        assert dispatcher.local.fallback is not None
        assert any("expert host 1" in line for line in dispatcher.links.degraded)
        with expert_hosts(demo, 2) as others:
            hosts[1] = others[1]
            poll(lambda: not dispatcher.links.degraded, deadline_s=60, what="the host's return")
            before = dispatcher.counters.fallbacks
            again = generate_greedy(engine, some, alone=False)

            def is_given_back() -> bool:
                generate_greedy(engine, some[:1], alone=False)  # it is while the engine steps
                return dispatcher.local.fallback is None

            poll(is_given_back, deadline_s=60, what="the memory to be given back")
            assert dispatcher.counters.fallbacks == before
    assert_identical(demo_reference, some, list(answers.values()))
    assert_identical(demo_reference, some, again)


def test_another_plan_is_learnt_from_the_refusal(demo: Path, demo_reference: Reference, cases: list[Case]) -> None:
    some = cases[:3]
    with expert_hosts(demo, 2) as hosts, engine_parts(demo, cache="0", hosts=hosts) as parts:
        first, second = hosts
        swapped = (second.owned, first.owned)
        for host, owned in zip(hosts, swapped, strict=True):
            host.set_plan(2, owned)
        answers = generate_greedy(parts.engine, some, alone=False)

        counters = _dispatcher(parts).counters
        assert counters.redispatched > 0
        assert counters.fallbacks == 0
        welcomes: list[Welcome] = [channel.welcome for channel in _dispatcher(parts).links.routes.channels]
        assert {welcome.epoch for welcome in welcomes} == {2}
    assert_identical(demo_reference, some, answers)


def test_checkpoint_damaged_under_host_and_worker_fails_the_request_with_the_files_name(
    tmp_path: Path, cases: list[Case]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(DEMO, path)
    with expert_hosts(path, 1, host_cache="12.5%") as hosts, engine_parts(path, cache="0", hosts=hosts) as parts:
        for shard in path.glob("*.safetensors"):
            with shard.open("r+b") as file:
                file.truncate(shard.stat().st_size // 8)
        with pytest.raises(ExpertReadError, match="safetensors"):
            generate_greedy(parts.engine, cases[:2], alone=False)
        assert torch.get_num_threads() == 1
