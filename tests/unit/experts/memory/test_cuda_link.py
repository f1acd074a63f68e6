"""The order of the calls that keep copies and kernels apart on a GPU, on a fake of what is used of CUDA.

The last test needs a GPU. Nothing else here says that CUDA does what it was told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from actors.experts.memory.cuda import CudaArena, CudaLink, PinnedArena, TorchCuda
from cluster.errors import ConfigError, ExpertReadError

SLOT = 3 * 4096
DEVICE = "cuda:0"


class FakeCuda:
    """Streams and events by name; what is told to them is in `log`, in order. Copies happen at once."""

    def __init__(self, *, num_devices: int = 1, max_pinned: int = 99, max_bytes: int = 10**9) -> None:
        self.num_devices, self.max_pinned, self.max_bytes = num_devices, max_pinned, max_bytes
        self.log: list[str] = []
        self.pinned: set[int] = set()
        self.inside_of: str | None = None
        self._numbers = count(1)

    def count(self) -> int:
        return self.num_devices

    def allocate(self, num_bytes: int, device: str) -> torch.Tensor:
        if num_bytes > self.max_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def pin(self, memory: torch.Tensor) -> int:
        if len(self.pinned) == self.max_pinned:
            return 2
        self.pinned.add(memory.data_ptr())
        return 0

    def unpin(self, memory: torch.Tensor) -> None:
        assert memory.any(), "unlocked before the system takes the pages back, not after"
        self.pinned.remove(memory.data_ptr())

    def is_pinned(self, memory: torch.Tensor) -> bool:
        return memory.data_ptr() in self.pinned

    def new_stream(self, device: str) -> FakeStream:
        return FakeStream("copy", self.log)

    def current_stream(self, device: str) -> FakeStream:
        return FakeStream("compute", self.log)

    @contextmanager
    def inside(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"begin in {stream.name}")
        yield
        self.log.append(f"end in {stream.name}")

    def new_event(self) -> FakeEvent:
        return FakeEvent(f"e{next(self._numbers)}", self.log)

    def keep_until_done(self, memory: torch.Tensor, stream: FakeStream) -> None:
        self.log.append(f"keep {memory.numel()} until {stream.name} is done")


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_event(self, event: FakeEvent) -> None:
        self._log.append(f"{self.name} waits for {event.name}")

    def synchronize(self) -> None:
        self._log.append(f"thread waits for {self.name}")


class FakeEvent:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def record(self, stream: FakeStream) -> None:
        self._log.append(f"{self.name} in {stream.name}")

    def synchronize(self) -> None:
        self._log.append(f"thread waits for {self.name}")


def make_link(cuda: FakeCuda) -> tuple[CudaLink, PinnedArena, CudaArena]:
    """Expert i is in slot i of RAM; RAM has 2 slots, DEVICE 3."""
    host, device = PinnedArena(2, SLOT, cuda), CudaArena(3, SLOT, DEVICE, cuda)
    for slot in range(2):
        host.view(slot)[:] = bytes([slot + 1]) * SLOT
    link = CudaLink(host, device, lambda index: index if index < 2 else None, cuda)
    cuda.log.clear()
    return link, host, device


def test_chunks_make_up_the_expert_and_touch_no_other_slot() -> None:
    link, _, device = make_link(FakeCuda())

    moved = sum(link.copy_chunk(1, chunk, 2) for chunk in range(link.num_chunks(1)))

    assert moved == SLOT
    assert [set(device.tensor(slot).tolist()) for slot in range(3)] == [{0}, {0}, {2}]
    assert [link.has(index) for index in range(3)] == [True, True, False]


def test_a_chunk_is_copied_in_the_copy_stream_and_its_thread_waits_for_that_chunk_only() -> None:
    cuda = FakeCuda()
    link, _, _ = make_link(cuda)

    link.copy_chunk(0, 0, 0)
    link.copy_chunk(0, 1, 0)

    chunk = ["begin in copy", "end in copy", "{0} in copy", "thread waits for {0}"]
    assert cuda.log == [line.format(event) for event in ("e1", "e2") for line in chunk]


def test_a_copy_waits_on_the_gpu_for_the_last_kernels_that_read_the_slot() -> None:
    cuda = FakeCuda()
    link, _, device = make_link(cuda)
    device.end_use(1)
    device.end_use(1)
    cuda.log.clear()

    link.copy_chunk(0, 0, 0)
    assert not any("waits for e1" in line or "waits for e2" in line for line in cuda.log), "another slot was read"
    cuda.log.clear()
    link.copy_chunk(0, 0, 1)

    assert cuda.log[:2] == ["copy waits for e2", "begin in copy"], "before anything is copied"


def test_kernels_wait_on_the_gpu_for_the_last_copy_into_the_slot() -> None:
    cuda = FakeCuda()
    link, _, device = make_link(cuda)

    device.begin_use(0)
    assert cuda.log == [], "nothing was copied there"
    for chunk in range(3):
        link.copy_chunk(0, chunk, 0)
    cuda.log.clear()
    device.begin_use(0)
    device.begin_use(1)

    assert cuda.log == ["compute waits for e3"]


def test_the_allocator_is_told_of_the_copy_stream() -> None:
    cuda = FakeCuda()
    CudaLink(PinnedArena(1, SLOT, cuda), CudaArena(2, SLOT, DEVICE, cuda), lambda _: None, cuda).close()

    assert cuda.log == [f"keep {2 * SLOT} until copy is done", "thread waits for copy"]


def test_only_slots_that_hold_something_are_page_locked_and_given_back_slots_are_not() -> None:
    cuda = FakeCuda()
    arena = PinnedArena(100, SLOT, cuda)
    assert len(cuda.pinned) == 1, "one, to know that it can be done"
    for slot in (0, 5, 5):
        arena.view(slot)[:] = b"x" * SLOT
    assert len(cuda.pinned) == 2

    arena.release(5)
    assert len(cuda.pinned) == 1
    assert not any(arena.view(5)), "the system has taken the pages back"
    arena.view(5)[:] = b"y" * SLOT
    assert len(cuda.pinned) == 2
    arena.close()
    assert not cuda.pinned


def test_memory_that_cannot_be_page_locked_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"experts\.ram_tier: 12288 bytes .* \(CUDA error 2\).*ulimit -l"):
        PinnedArena(2, SLOT, FakeCuda(max_pinned=0))


def test_memory_that_cannot_be_page_locked_later_fails_the_load_and_is_not_copied_from() -> None:
    arena = PinnedArena(3, SLOT, FakeCuda(max_pinned=2))
    arena.view(1)[:] = b"x" * SLOT

    with pytest.raises(ExpertReadError, match="beside 24576"):
        arena.view(2)
    with pytest.raises(ExpertReadError, match="beside 24576"):
        arena.tensor(2)


def test_memory_that_is_locked_but_not_known_to_torch_is_refused() -> None:
    cuda = FakeCuda()
    cuda.is_pinned = lambda memory: False  # type: ignore[method-assign]

    with pytest.raises(ConfigError, match="page-locked"):
        PinnedArena(1, SLOT, cuda)


def test_too_little_gpu_memory_names_the_field_and_the_bytes() -> None:
    with pytest.raises(ConfigError, match=rf"experts\.cache: {4 * SLOT} bytes do not fit on cuda:0"):
        CudaArena(4, SLOT, DEVICE, FakeCuda(max_bytes=SLOT))


@pytest.mark.parametrize("device", ["cuda:1", "cuda", "cpu", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device {device}: this process can use 1 CUDA"):
        CudaArena(1, SLOT, device, FakeCuda())


def test_an_error_of_the_gpu_is_a_load_that_failed() -> None:
    cuda = FakeCuda()
    link, _, _ = make_link(cuda)

    @contextmanager
    def broken(stream: FakeStream) -> Iterator[None]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    cuda.inside = broken  # type: ignore[method-assign]
    with pytest.raises(ExpertReadError, match=r"to cuda:0 failed: CUDA error: an illegal"):
        link.copy_chunk(0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said where there is no GPU")
def test_without_a_gpu_the_real_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="can use 0 CUDA devices"):
        PinnedArena(1, SLOT, TorchCuda())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: copies by CUDA itself")
def test_on_a_gpu_experts_arrive_whole_while_kernels_read_other_slots() -> None:
    cuda, generator = TorchCuda(), torch.Generator().manual_seed(0)
    host, device = PinnedArena(8, SLOT, cuda), CudaArena(2, SLOT, DEVICE, cuda)
    truth = torch.randint(0, 256, (8, SLOT), dtype=torch.uint8, generator=generator)
    for slot in range(8):
        host.view(slot)[:] = truth[slot].numpy().tobytes()
    link = CudaLink(host, device, lambda index: index, cuda)

    sums = []
    for index in range(8):
        slot = index % 2
        for chunk in range(link.num_chunks(index)):
            link.copy_chunk(index, chunk, slot)
        device.begin_use(slot)
        sums.append(device.tensor(slot).to(torch.int64).sum())
        device.end_use(slot)

    assert [int(total) for total in sums] == truth.to(torch.int64).sum(1).tolist()
    assert host.tensor(0).is_pinned()
    link.close()
    host.close()
