"""Expert memories whose links are held, recorded and split: what tests of tiers and of prefetch share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from expert_builders import ExpertFile, HeldLink

from actors.experts.memory.arena import RamArena
from actors.experts.memory.emulated import RamLink
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore
from cluster.types import ExpertId

NUM_EXPERTS, LAYERS = 6, 2


SIZE = NUM_EXPERTS * LAYERS


class Recorded:
    """Links made by a store, in the order of making, each behind a HeldLink."""

    def __init__(self) -> None:
        self.made: list[HeldLink] = []

    def wrap(self, link: MemoryLink) -> MemoryLink:
        self.made.append(HeldLink(link))
        return self.made[-1]

    def ram_link(self, source: RamArena, target: RamArena, slot_of: Callable[[int], int | None]) -> MemoryLink:
        return self.wrap(RamLink(source, target, slot_of))


class InChunks:
    """Splits what a link moves at once into three parts, of which the last one moves it; notes the order."""

    def __init__(self, link: MemoryLink) -> None:
        assert isinstance(link, HeldLink)
        self.link, self.tier = link, link.tier
        self.link.order = []

    def has(self, index: int) -> bool:
        return self.link.has(index)

    def num_chunks(self, index: int) -> int:
        return 3

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        self.link.order.append((index, chunk))
        if chunk == 0:
            return self.link.copy_chunk(index, 0, slot)
        return 0

    def close(self) -> None:
        self.link.close()


def wanted_groups(store: ExpertStore, file: ExpertFile, layer: int, experts: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for group in store.acquire(layer, experts):
        groups.append([expert for expert, _ in group])
        for expert, weights in group:
            truth = file.experts[ExpertId(layer, expert)].weights()
            assert torch.equal(weights.down.data, truth.down.data), f"expert {expert} of layer {layer}"
    assert sorted(expert for group in groups for expert in group) == sorted(experts)
    return groups


def priority_of(**by_index: float) -> np.ndarray:
    priority = np.zeros(SIZE, dtype=np.float32)
    for index, value in by_index.items():
        priority[int(index.removeprefix("e"))] = value
    return priority


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(1e-3)
