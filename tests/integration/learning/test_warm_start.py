"""A worker that joins others begins with the experts that they use: its first request hits far more often than cold."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live_server import poll

from actors.attention.worker import AttentionWorker
from cluster.config.load import load_config
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.model.info import load_model_info
from cluster.protocols import StateStore
from cluster.stats.embedded_valkey import start_embedded_valkey
from cluster.stats.memory_store import MemoryStore
from cluster.stats.redis_store import RedisStore
from cluster.types import GenerationRequest, RequestId, SamplingParams, StartupPhase

pytestmark = pytest.mark.slow  # transformers' models take seconds to import

NUM_TOKENS = 16
PROMPTS = (
    "def fibonacci(n):\n    ",
    "class Stack:\n    def push(self, item):",
    "import json\n\ndef read(path):",
    "def is_prime(number):\n    for",
    "def reverse(words):\n    return",
)


@contextmanager
def _worker(store: StateStore) -> Iterator[AttentionWorker]:
    # Nothing that learns or runs ahead: what differs is what is in memory at the start, not how busy the machine is.
    experts = {"cache": "75%", "eviction": "lru", "prediction": "none"}
    config = load_config(None, {"experts": experts, "attention": {"threads": 1}})
    worker = AttentionWorker(config, load_model_info("moesaic-demo"), store)
    worker.start()
    poll(lambda: worker.phase is StartupPhase.READY, deadline_s=60, what=lambda: f"ready; it is {worker.phase}")
    yield worker
    worker.stop()


def _generate(worker: AttentionWorker, prompt: str) -> None:
    async def count() -> int:
        token_ids = tuple(Tokenizer.load(worker.info.path).encode(prompt))
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        request = GenerationRequest(request_id=RequestId("r"), prompt_ids=token_ids, sampling=sampling)
        return sum([len(chunk.token_ids) async for chunk in worker.generate(request)])

    assert asyncio.run(count()) == NUM_TOKENS


def _first_hits(worker: AttentionWorker) -> tuple[int, float]:
    """Experts in memory before the first request, and the share of its expert uses that were."""
    assert worker.parts is not None
    store = worker.parts.store
    num_resident = store.num_resident
    _generate(worker, PROMPTS[-1])
    hits, misses = int(store.counters.hits.sum()), store.counters.num_misses
    return num_resident, hits / (hits + misses)


def test_a_newcomer_is_warm_before_it_is_ready(tmp_path: Path) -> None:
    server = start_embedded_valkey(tmp_path)
    try:
        with _worker(RedisStore(server.url)) as first:
            for prompt in PROMPTS[:-1]:
                _generate(first, prompt)
        with _worker(RedisStore(server.url)) as second:
            num_warm, warm = _first_hits(second)
            assert second.parts is not None
            assert num_warm == second.parts.store.num_slots
    finally:
        server.stop()
    with _worker(MemoryStore()) as alone:
        num_cold, cold = _first_hits(alone)
    assert num_cold == 0
    assert warm > cold + 0.1, f"hit rate of the first request: {warm:.2f}, cold {cold:.2f}"
