"""Attention workers in this process: what one learned is in its file, and in the next one from the start."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_server import poll

from actors.attention.worker import AttentionWorker
from cluster.config.load import load_config
from cluster.model.info import load_model_info
from cluster.policies.policy_state import load_policy_state, num_learned, save_policy_state
from cluster.protocols import StateStore
from cluster.stats.embedded_valkey import start_embedded_valkey
from cluster.stats.memory_store import MemoryStore
from cluster.stats.redis_store import RedisStore
from cluster.types import GenerationRequest, RequestId, SamplingParams, StartupPhase

pytestmark = pytest.mark.slow  # transformers' models take seconds to import

NUM_TOKENS = 24


@contextmanager
def _worker(store: StateStore, policy: str, path: Path | None = None) -> Iterator[AttentionWorker]:
    experts = {"cache": "25%", "eviction": policy, "prediction": policy, "policy_state": path and str(path)}
    config = load_config(None, {"experts": experts, "attention": {"threads": 1}})
    worker = AttentionWorker(config, load_model_info("moesaic-demo"), store)
    worker.start()
    ended = (StartupPhase.READY, StartupPhase.FAILED)
    poll(lambda: worker.phase in ended, deadline_s=60, what=lambda: f"ready; it is {worker.phase}")
    yield worker
    worker.stop()


def _generate(worker: AttentionWorker) -> None:
    async def count() -> int:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        request = GenerationRequest(request_id=RequestId("r"), prompt_ids=tuple(range(5, 20)), sampling=sampling)
        return sum([len(chunk.token_ids) async for chunk in worker.generate(request)])

    assert asyncio.run(count()) == NUM_TOKENS


def _num_learned(worker: AttentionWorker) -> dict[str, int]:
    assert worker.parts is not None and worker.parts.policy_runner is not None
    policy_runner = worker.parts.policy_runner
    groups = policy_runner.ask(
        lambda: {name: part.to_arrays() for name, part in policy_runner.policies.learned.items()}, 10
    )
    return {name: num_learned(arrays) for name, arrays in groups.items()}


def test_a_fresh_worker_starts_with_what_others_learned(tmp_path: Path) -> None:
    server = start_embedded_valkey(tmp_path)
    try:
        with _worker(RedisStore(server.url), "moesaic") as first:
            assert _num_learned(first) == {"next_use": 0}
            _generate(first)
        with _worker(RedisStore(server.url), "moesaic") as second:
            assert _num_learned(second)["next_use"] >= NUM_TOKENS - 2, "the first token has no past"
    finally:
        server.stop()


def test_a_file_keeps_what_every_policy_learned(tmp_path: Path) -> None:
    path = tmp_path / "learned.npz"
    for policy in ("moesaic", "fmoe"):
        with _worker(MemoryStore(), policy, path) as worker:
            _generate(worker)
    saved = {name: num_learned(arrays) for name, arrays in load_policy_state(path, worker.info.fingerprint).items()}
    assert set(saved) == {"next_use", "maps"} and min(saved.values()) >= NUM_TOKENS - 2
    with _worker(MemoryStore(), "moesaic", path) as worker:
        assert _num_learned(worker) == {"next_use": saved["next_use"]}


def test_a_file_of_another_model_fails_the_start_with_both_fingerprints(tmp_path: Path) -> None:
    path = tmp_path / "learned.npz"
    save_policy_state(path, "0123456789abcdef", {})
    with _worker(MemoryStore(), "moesaic", path) as worker:
        assert worker.phase is StartupPhase.FAILED
        assert worker.error is not None
        for part in (str(path), "0123456789abcdef", worker.info.fingerprint, "experts.policy_state"):
            assert part in worker.error.message
