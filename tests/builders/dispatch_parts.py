"""Experts on fake hosts and here: the work of a step, who owns what, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from expert_builders import HIDDEN, ExpertFile, dense_form, open_store, random_routing, write_experts
from memory_hosts import LAYER, NUM_EXPERTS, TOP_K, Host, Worker
from torch import Tensor

from actors.experts.backend import ExpertBackend
from actors.experts.compute import ExpertCompute
from actors.experts.dispatch import LocalDispatcher
from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork
from actors.kernels.native import load_native


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), num_experts=NUM_EXPERTS)


@pytest.fixture(scope="module")
def compute() -> ExpertCompute:
    return ExpertCompute(load_native(threads=1), dense_form(torch.float32), compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def everything(experts: ExpertFile, compute: ExpertCompute) -> Iterator[ExpertBackend]:
    """All experts, as a host has them, and as the specification does."""
    store = open_store(experts, slots=2 * NUM_EXPERTS)
    yield ExpertBackend(store, compute)
    store.close()


def work_of(num_rows: int, *, padding: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32) -> ExpertWork:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows + padding, HIDDEN, generator=generator).to(dtype)
    ids, weights = random_routing(num_rows + padding, TOP_K, range(NUM_EXPERTS), generator)
    return ExpertWork(LAYER, x, ids, weights)


def local_sum(everything: ExpertBackend, work: ExpertWork, num_rows: int) -> Tensor:
    recorder = ActivationRecorder((0, 1), NUM_EXPERTS, None)
    return LocalDispatcher(everything, recorder).start(work, num_rows, 0)()


def hosts_owning(everything: ExpertBackend, *owned: Sequence[int]) -> list[Host]:
    return [Host(index, set(experts), everything) for index, experts in enumerate(owned)]


@pytest.fixture
def make_worker(experts: ExpertFile, compute: ExpertCompute) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(hosts: Sequence[Host], **options: object) -> Worker:
        made.append(Worker(experts, compute, hosts, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for worker in made:
        worker.dispatcher.close()
