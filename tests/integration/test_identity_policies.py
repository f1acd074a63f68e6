"""The identity rule holds whatever is evicted, fetched ahead, or kept in which tier: policies move bytes only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from identity import PAIRS, Case, Reference, assert_identical, demo_cases, engine_parts, generate_greedy, random_cases
from model_builders import DEMO, NUM_EXPERTS, TOP_K, build_checkpoint
from tokenizers import Tokenizer

from cluster.config.sections import ExpertsConfig
from cluster.model.info import load_model_info
from cluster.types import Tier

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TINY_SMALLEST = f"{100 * TOP_K / (3 * NUM_EXPERTS) + 0.01:.2f}%"  # one token's top-k in one layer


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(DEMO)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return demo_cases(lambda text: tokenizer.encode(text).ids, prompts_per_domain=2)[:16]


def test_every_policy_that_can_be_configured_is_here() -> None:
    fields = ExpertsConfig.model_fields
    evictions, predictions = (set(fields[name].annotation.__args__) for name in ("eviction", "prediction"))  # type: ignore[union-attr]

    assert {eviction for eviction, _ in PAIRS} == evictions
    assert {prediction for _, prediction in PAIRS} == predictions


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3_moe")


@pytest.fixture(scope="module")
def tiny_reference(tiny: Path) -> Reference:
    return Reference(tiny)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "16-concurrent"])
@pytest.mark.parametrize("cache", [TINY_SMALLEST, "50%", "100%"])
@pytest.mark.parametrize(("eviction", "prediction"), PAIRS)
def test_policies_change_no_token_of_a_random_model(
    tiny: Path, tiny_reference: Reference, eviction: str, prediction: str, cache: str, alone: bool
) -> None:
    prompts = random_cases(3 if alone else 16, vocab_size=load_model_info(str(tiny)).vocab_size)
    experts = {"eviction": eviction, "prediction": prediction}
    with engine_parts(tiny, cache=cache, kv_blocks=26, max_running=16, experts=experts) as parts:
        answers = generate_greedy(parts.engine, prompts, alone=alone)
    assert_identical(tiny_reference, prompts, answers)


@pytest.mark.parametrize(("eviction", "prediction"), [p for p in PAIRS if "none" not in p])
def test_policies_change_no_token_of_the_demo_model(
    demo: Path, reference: Reference, cases: list[Case], eviction: str, prediction: str
) -> None:
    experts = {"eviction": eviction, "prediction": prediction}
    with engine_parts(demo, cache="25%", kv_blocks=60, max_running=16, experts=experts) as parts:
        answers = generate_greedy(parts.engine, cases, alone=False)
        alone = generate_greedy(parts.engine, cases[:1], alone=True)

        counters = parts.store.counters
        assert counters.prefetch_used.sum() + counters.late.sum() > 0
        assert parts.policy_runner is not None
        assert parts.policy_runner.search_share > 0
    assert_identical(reference, cases, answers)
    assert alone == answers[:1]


@pytest.mark.parametrize("ram_tier", ["100%", "40%"])
def test_tiers_change_no_token(demo: Path, reference: Reference, cases: list[Case], ram_tier: str) -> None:
    with engine_parts(
        demo, cache="12.5%", max_running=16, experts={"ram_tier": ram_tier, "link_gb_per_s": 2.0}
    ) as parts:
        assert parts.store.wait_idle(60)
        answers = generate_greedy(parts.engine, cases, alone=False)

        moved = parts.store.counters.bytes_moved
        assert moved[Tier.RAM] > 0
        if ram_tier == "100%":
            assert moved[Tier.DISK] <= 1.01 * parts.store.model_bytes, "read once"
    assert_identical(reference, cases, answers)


def test_a_budget_lowered_and_raised_under_way_changes_no_token(
    demo: Path, reference: Reference, cases: list[Case]
) -> None:
    with engine_parts(demo, cache="50%", max_running=16) as parts:
        store, execute = parts.store, parts.engine.runner.execute
        num_steps = 0

        def with_changes(rows: object) -> torch.Tensor:
            nonlocal num_steps
            num_steps += 1
            percent = {5: 10, 20: 30, 30: 5}.get(num_steps)
            if percent is not None:
                store.set_budget(store.model_bytes * percent // 100)
            assert store.num_resident <= store.num_slots
            return execute(rows)  # type: ignore[arg-type]

        parts.engine.runner.execute = with_changes  # type: ignore[method-assign, assignment]
        answers = generate_greedy(parts.engine, cases, alone=False)

        assert num_steps > 30
        assert store.num_slots == store.grid.size * 5 // 100
    assert_identical(reference, cases, answers)


def test_everything_resident_reads_nothing_and_hears_nothing(demo: Path, cases: list[Case]) -> None:
    with engine_parts(demo, cache="100%", max_running=16) as parts:
        for layer in parts.store.grid.layers:
            for _ in parts.store.acquire(layer, range(parts.store.grid.num_experts)):
                pass
        read = parts.store.bytes_read

        generate_greedy(parts.engine, cases[:4], alone=False)

        assert parts.store.bytes_read == read
        assert parts.policy_runner is not None
        assert parts.policy_runner.step_s == 0.0
