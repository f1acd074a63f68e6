"""Engines of benchmark `offload`, part live: built, filled, taught, watched while they run."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from actors.attention.build import build_engine
from actors.engine.loaded_engine import LoadedEngine
from actors.experts.memory.store import ExpertStore
from actors.experts.policy_runner import LayerTimes
from actors.ray_shells.deployments import SWITCH_INTERVAL_S
from cluster.config.load import load_config
from cluster.model.info import ModelInfo
from cluster.policies.signals import GateSignal, StepSignal
from cluster.replay.schedule import ReplayStep
from cluster.replay.sweep import show

MAX_LEN = 256
_FILL_LIMIT_S = 300.0
_LEARN_LIMIT_S = 600.0


@contextlib.contextmanager
def engine(info: ModelInfo, policy: str, *, cache: float, link: float | None = None) -> Iterator[LoadedEngine]:
    """An engine on one thread, which shares the interpreter lock as a worker's does.

    Args:
        link: GB/s from a RAM tier that holds everything; None: there is no RAM.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    eviction, _, prediction = policy.partition("+")
    experts: dict[str, Any] = {"cache": f"{100 * cache:g}%", "eviction": eviction, "prediction": prediction}
    if link is not None:
        experts |= {"ram_tier": "100%", "link_gb_per_s": link}
    sections = {
        "model": {"path": str(Path(info.path)), "dtype": "bfloat16", "max_model_len": MAX_LEN},
        "attention": {"kv_cache": "32MiB"},
        "experts": experts,
    }
    parts = build_engine(load_config(None, sections), info, threads=1)
    try:
        yield parts
    finally:
        parts.dispatcher.close()


def make_resident(parts: LoadedEngine) -> None:
    """Use every expert once."""
    store = parts.store
    for layer in store.grid.layers:
        for _ in store.acquire(layer, range(store.grid.num_experts)):
            pass


def fill_ram(parts: LoadedEngine) -> None:
    """Wait until RAM holds every expert: it fills itself from disk."""
    store, deadline = parts.store, time.monotonic() + _FILL_LIMIT_S
    while store.ram_resident < store.grid.size:
        if time.monotonic() > deadline:
            raise TimeoutError(f"RAM holds {store.ram_resident} of {store.grid.size} experts after {_FILL_LIMIT_S} s")
        time.sleep(0.02)


def learn(parts: LoadedEngine, past: Sequence[ReplayStep]) -> None:
    """Show the steps of other prompts to the policies, as if they had been computed here."""
    policy_runner = parts.policy_runner
    if policy_runner is None:
        return
    policies = policy_runner.policies

    def show_all() -> None:
        for step in past:
            show(step, policies.listeners, asked=policies.scorer.scores)

    policy_runner.post(show_all)
    policy_runner.ask(dict, _LEARN_LIMIT_S)


@contextlib.contextmanager
def timed_forecasts(parts: LoadedEngine) -> Iterator[list[float]]:
    """From a gate, or a step's beginning, to what is wanted by it; nothing for a policy that fetches nothing ahead."""
    policy_runner, store = parts.policy_runner, parts.store
    took_s: list[float] = []
    if policy_runner is None or policy_runner.policies.predictor is None:
        yield took_s
        return
    spoke_s: deque[float] = deque()  # those that nothing is wanted by yet
    begin_step, post_gates, want = policy_runner.begin_step, policy_runner.post_gates, store.want

    def timed_begin(make: Callable[[], StepSignal]) -> None:
        spoke_s.append(time.perf_counter())
        begin_step(make)

    def timed_gates(make: Callable[[], Sequence[GateSignal]], times: LayerTimes) -> None:
        spoke_s.append(time.perf_counter())
        post_gates(make, times)

    def timed_want(priority: np.ndarray | None, below: np.ndarray | None = None) -> None:
        want(priority, below)
        took_s.append(time.perf_counter() - spoke_s.popleft())

    with (
        patch.object(policy_runner, "begin_step", timed_begin),
        patch.object(policy_runner, "post_gates", timed_gates),
        patch.object(store, "want", timed_want),
    ):
        yield took_s
        deadline = time.monotonic() + _LEARN_LIMIT_S
        while spoke_s and time.monotonic() < deadline:
            time.sleep(1e-3)


@contextlib.contextmanager
def keep_loading(store: ExpertStore) -> Iterator[None]:
    """Load experts ahead, one after the other, in turn."""
    is_over = threading.Event()

    def load() -> None:
        for index in itertools.cycle(range(store.grid.size)):
            expert = store.form.expert(index)
            while not store.prefetch(expert, replaces=lambda _: True):
                if is_over.is_set():
                    return
                if store.resident(expert[0])[expert[1]]:
                    break
                time.sleep(1e-4)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_LEARN_LIMIT_S)
