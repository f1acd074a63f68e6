"""Who is admitted first: sequences that share experts, but nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from batcher_steps import take_step
from engine_builders import make_batcher, make_request
from knowledge_builders import embedding_of, make_knowledge

from actors.engine.batcher import Batcher
from actors.engine.sequence import Sequence, SequenceState
from cluster.semantics.co_batching import CoBatching


def _add_kind(batcher: Batcher, name: str, kind: int, start: int) -> Sequence:
    request = replace(make_request(name, prompt=range(start, start + 4), max_tokens=9), embedding=embedding_of(kind))
    sequence = Sequence(request)
    batcher.add(sequence)
    return sequence


def _co_batching() -> CoBatching:
    """Kind 0 uses experts 0 and 1, kind 1 uses 2 and 3."""
    uses = np.zeros((2, 1, 4))
    uses[0, 0, :2] = uses[1, 0, 2:] = 0.9
    co_batching = CoBatching(max_overtaken=2)
    co_batching.set_knowledge(make_knowledge(uses))
    return co_batching


def test_co_batching_admits_who_shares_experts_but_nobody_waits_for_ever() -> None:
    batcher = make_batcher(max_running=2)
    batcher.co_batching = _co_batching()
    first = _add_kind(batcher, "first", 0, 0)
    take_step(batcher)
    other = _add_kind(batcher, "other", 1, 10)
    alike = [_add_kind(batcher, f"alike {i}", 0, 20 + 10 * i) for i in range(3)]

    joined = []
    for _ in range(4):
        take_step(batcher)
        newest = batcher._running[-1]
        joined.append(newest.request.request_id)
        batcher.finish(newest)

    assert joined == ["alike 0", "alike 1", "other", "alike 2"]
    assert first.state is SequenceState.RUNNING and other.overtaken == 2 and alike[2].overtaken == 0


def test_who_was_preempted_comes_back_before_anybody_joins() -> None:
    batcher = make_batcher(num_blocks=4, block_size=4)
    batcher.co_batching = _co_batching()
    kept, put_out = _add_kind(batcher, "kept", 0, 0), _add_kind(batcher, "put out", 1, 10)
    while not batcher.num_preemptions:
        take_step(batcher)
    _add_kind(batcher, "alike", 0, 20)
    batcher.finish(kept)
    take_step(batcher)

    assert put_out.state is SequenceState.RUNNING


def test_without_knowledge_co_batching_is_first_come_first_served() -> None:
    batcher = make_batcher(max_running=1)
    batcher.co_batching = CoBatching()
    names = [f"{i}" for i in range(5)]
    waiting = [_add_kind(batcher, name, i % 2, 10 * i) for i, name in enumerate(names)]

    served = []
    for _ in waiting:
        ((name, _),) = take_step(batcher)
        served.append(name)
        batcher.finish(next(sequence for sequence in waiting if sequence.request.request_id == name))

    assert served == names
