"""The parts of benchmark `offload` whose numbers would be wrong without anybody noticing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_builders import make_engine

from actors.engine.engine import StepOutput
from actors.experts.memory.counters import MemoryCounters
from benchmarks.offload import confinement, steps
from benchmarks.offload.agreement import ComputeTimes
from benchmarks.offload.gguf import write_gguf
from cluster.errors import ExpertReadError
from cluster.types import RequestId, Tier

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def permitted(tmp_path: Path) -> None:
    """Skips where this machine does not let us confine children."""
    reason = confinement.why_not_permitted(tmp_path)
    if reason is not None:
        pytest.skip(f"no cgroups of version 1 here: {reason}")


class TestFigures:
    def test_counts_time_to_first_token_apart_from_time_per_token(self) -> None:
        figures = steps.Figures()
        figures.add(
            [
                steps.Step(0.0, 2.0, ((0, 7),), has_prompt_rows=True, joined=(0, 1), bytes_read=500),
                steps.Step(2.0, 3.0, ((0, 8), (1, 5)), has_prompt_rows=True),
                steps.Step(3.0, 3.5, ((0, 9), (1, 6)), has_prompt_rows=False, bytes_read=40),
                steps.Step(3.5, 4.0, ((1, 4),), has_prompt_rows=False, bytes_read=20),
            ]
        )
        assert figures.first_token_s == [2.0, 3.0]
        assert figures.intervals_s == [1.0, 0.5, 0.5, 0.5]
        assert figures.decode_rate == pytest.approx(3 / 1.0)
        assert figures.columns()["MB read/token"] == pytest.approx(60 / 3 / 1e6)

    def test_rounds_are_joined_without_intervals_across_them(self) -> None:
        one, other = steps.Figures(), steps.Figures()
        for figures, at in ((one, 0.0), (other, 100.0)):
            figures.add(
                [
                    steps.Step(at, at + 1, ((0, 1),), has_prompt_rows=True, joined=(0,)),
                    steps.Step(at + 1, at + 2, ((0, 2),), has_prompt_rows=False),
                ]
            )
        one.join(other)
        assert one.intervals_s == [1.0, 1.0]
        assert one.num_decoded == 2

    def test_rates_count_late_experts_as_hits_but_not_as_timely(self) -> None:
        figures = steps.Figures()
        of_prompt = steps.MemoryUse(hits=0, misses=100)
        of_decode = steps.MemoryUse(hits=6, late=1, misses=4)
        figures.add(
            [
                steps.Step(0.0, 1.0, ((0, 1),), has_prompt_rows=True, joined=(0,), memory=of_prompt),
                steps.Step(1.0, 2.0, ((0, 2),), has_prompt_rows=False, memory=of_decode),
            ]
        )
        columns = figures.columns()
        assert (columns["hit"], columns["timely"]) == (pytest.approx(0.7), pytest.approx(0.6))

    def test_a_step_survives_the_way_between_processes(self) -> None:
        step = steps.Step(1.0, 2.0, ((3, 4),), True, (3,), 9, steps.MemoryUse(hits=1, stall_s=0.5))
        assert steps.Step.from_dict(json.loads(step.to_line())["step"]) == step


class TestDrive:
    def test_keeps_so_many_prompts_running_and_says_when_they_joined(self) -> None:
        counters = MemoryCounters(1)
        parts = SimpleNamespace(engine=make_engine(), store=SimpleNamespace(counters=counters))
        done = list(steps.drive(parts, [[1, 2], [3], [5]], num_tokens=2, concurrency=2))
        assert [step.joined for step in done] == [(0, 1), (), (2,), ()]
        assert [step.has_prompt_rows for step in done] == [True, False, True, False]
        assert [step.tokens for step in done] == [((0, 3), (1, 4)), ((0, 4), (1, 5)), ((2, 6),), ((2, 7),)]

    def test_a_step_has_what_the_memory_counted_in_it(self) -> None:
        counters = MemoryCounters(1)
        engine = make_engine()
        compute = engine.step

        def step() -> Any:
            counters.hits[0] += 2
            counters.misses[Tier.RAM][0] += 1
            counters.bytes_moved[Tier.RAM] += 10
            return compute()

        engine.step = step
        parts = SimpleNamespace(engine=engine, store=SimpleNamespace(counters=counters))
        done = list(steps.drive(parts, [[1, 2]], num_tokens=3, concurrency=1))
        assert [s.memory for s in done] == [steps.MemoryUse(hits=2, misses=1, ram_bytes=10)] * 3

    def test_a_failed_sequence_is_no_measurement(self) -> None:
        engine = make_engine()
        failure = ExpertReadError("the disk is gone")
        engine.step = lambda: [StepOutput(RequestId("0"), -1, None, None, 0, error=failure)]  # type: ignore[method-assign]
        parts = SimpleNamespace(engine=engine, store=SimpleNamespace(counters=MemoryCounters(1)))
        with pytest.raises(ExpertReadError, match="the disk is gone"):
            next(steps.drive(parts, [[1, 2]], num_tokens=3, concurrency=1))


def test_compute_times_follow_from_numbers_of_experts_and_of_sequences() -> None:
    def resident(num_experts: int, num_sequences: int, step_s: float) -> Any:
        figures = steps.Figures()
        memory, tokens = steps.MemoryUse(hits=num_experts), tuple((i, 1) for i in range(num_sequences))
        figures.add(
            [steps.Step(0.0, step_s, tokens, has_prompt_rows=False, joined=tuple(range(num_sequences)), memory=memory)]
        )
        return figures

    runs = resident(48, 1, 0.028), resident(48, 8, 0.036), resident(240, 8, 0.132)
    times = ComputeTimes.of(*runs, num_layers=12)
    assert times.expert_s == pytest.approx(0.0005)
    assert times.base_s == pytest.approx((0.028 - 48 * 0.0005) / 12)
    assert times.sequence_s == pytest.approx(0.008 / 7 / 12)


@pytest.mark.usefixtures("permitted")
class TestConfinement:
    def test_direct_reads_are_throttled(self, tmp_path: Path) -> None:
        file = tmp_path / "data"
        file.write_bytes(os.urandom(4 << 20))
        os.sync()
        limits = confinement.Limits(2**28, 4_000_000, confinement.disk_of(file))
        try:
            rate = confinement.measured_read_rate(file, limits, 4 << 20)
        except OSError as error:
            pytest.skip(f"no direct reads under {tmp_path}: {error}")
        assert 2e6 < rate < 5e6

    def test_a_child_that_takes_too_much_is_killed_and_its_groups_go(self) -> None:
        name = f"moesaic-test-{os.getpid()}"
        group = confinement.Confinement(name, confinement.Limits(memory_bytes=64 * 2**20), permitted=True)
        made = list(group.groups)
        try:
            child = group.start([sys.executable, "-c", "b = bytearray(256 * 2**20); print(len(b))"], {})
            out, _ = child.communicate(timeout=60)
            assert out == "" and child.returncode != 0
            assert group.out_of_memory()
        finally:
            group.close()
        assert made and not any(path.exists() for path in made)

    def test_memory_of_a_child_is_seen(self) -> None:
        name = f"moesaic-test-{os.getpid()}"
        group = confinement.Confinement(name, confinement.Limits(), permitted=True)
        script = "import sys; b = bytearray(96 * 2**20); print('ready', flush=True); sys.stdin.read()"
        try:
            child = group.start([sys.executable, "-c", script + "; import time; time.sleep(600)"], {})
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            assert group.own_bytes() > 96 * 2**20
        finally:
            group.close()
        confinement.end(child)
        assert child.returncode == -9


def test_gguf_holds_the_same_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors import safe_open

    model = ROOT / "models" / "moesaic-demo"
    file = write_gguf(model, tmp_path / "demo.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with safe_open(model / "model.safetensors", framework="pt") as stored:
        expert = stored.get_tensor("model.layers.3.mlp.experts.5.down_proj.weight")
        query = stored.get_tensor("model.layers.3.self_attn.q_proj.weight")
    stacked = tensors["blk.3.ffn_down_exps.weight"]
    assert list(stacked.shape) == [expert.shape[1], expert.shape[0], 32]  # GGUF counts dimensions from the fastest
    assert np.array_equal(_bits(stacked.data)[5 * expert.numel() :][: expert.numel()], _bits(expert))
    assert np.array_equal(_bits(tensors["blk.3.attn_q.weight"].data), _bits(query))
    assert len(tensors) == 2 + 12 * 12


def _bits(values: Any) -> np.ndarray:
    """bfloat16 values as integers, flat."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values).view(np.int16).reshape(-1)
    import torch

    return values.contiguous().view(torch.int16).numpy().reshape(-1)
