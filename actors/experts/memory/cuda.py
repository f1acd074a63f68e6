"""Expert memory on a GPU: pinned memory as RAM, GPU memory as DEVICE, and the link between them. Never run on a GPU.

Groundwork: the fast tier in GPU memory. Missing: kernels that compute experts on a GPU, and a store that is built from
these arenas and this link; experts are computed on the CPU.

The one file with CUDA streams and events. What tests pin without a GPU is the order of its calls. Knows bytes, slots
and one device; knows no experts' contents, no policies.

Who may touch a slot when. Host threads and the GPU run apart, so "the copy was started" and "the kernel was started"
say nothing of their ends. A copy into a slot therefore waits, on the GPU, for the last kernel that reads it
(`CudaArena.end_use`), and a kernel waits, on the GPU, for the last copy into it (`CudaArena.begin_use`). Besides, the
thread that began a chunk's copy sleeps until its end: its source may be overwritten once it returns, and no more than
one chunk per thread is ever ahead of a demand in the stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from actors.experts.memory.arena import RamArena
from cluster.errors import ConfigError, ExpertReadError
from cluster.types import Tier

_CHUNKS = 3


class CudaApi(Protocol):
    """What is used of CUDA; TorchCuda is the real one."""

    def count(self) -> int:
        """GPUs that can be used."""
        ...

    def allocate(self, num_bytes: int, device: str) -> Tensor:
        """GPU memory [num_bytes] uint8. Raises RuntimeError: there is not so much."""
        ...

    def pin(self, memory: Tensor) -> int:
        """Make RAM page-locked; CUDA's error code, 0 is success."""
        ...

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`."""
        ...

    def is_pinned(self, memory: Tensor) -> bool:
        """Whether copies from here are asynchronous."""
        ...

    def new_stream(self, device: str) -> torch.cuda.Stream:
        """A stream beside the one that computes."""
        ...

    def current_stream(self, device: str) -> torch.cuda.Stream:
        """The stream that this thread computes in."""
        ...

    def inside(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """What is begun within goes into `stream`."""
        ...

    def new_event(self) -> torch.cuda.Event:
        """An event whose waiting threads sleep."""
        ...

    def keep_until_done(self, memory: Tensor, stream: torch.cuda.Stream) -> None:
        """The allocator must not hand out freed `memory` again before `stream` is done with it."""
        ...


class TorchCuda:
    """CUDA by torch."""

    def count(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def allocate(self, num_bytes: int, device: str) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def pin(self, memory: Tensor) -> int:
        # Not pin_memory=True: torch's allocator rounds up to a power of two, and a budget would be exceeded.
        return int(_cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))

    def unpin(self, memory: Tensor) -> None:
        _cudart().cudaHostUnregister(memory.data_ptr())

    def is_pinned(self, memory: Tensor) -> bool:
        return memory.is_pinned()

    def new_stream(self, device: str) -> torch.cuda.Stream:
        return torch.cuda.Stream(device=device)

    def current_stream(self, device: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def inside(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(blocking=True)

    def keep_until_done(self, memory: Tensor, stream: torch.cuda.Stream) -> None:
        memory.record_stream(stream)


class PinnedArena(RamArena):
    """The RAM tier: memory that the GPU copies from by itself. A slot is page-locked when it is first written.

    Copies from memory that is not page-locked would neither leave the thread free nor end chunk by chunk: there is no
    falling back to it.
    """

    def __init__(self, num_slots: int, slot_bytes: int, cuda: CudaApi) -> None:
        """Raises:
        ConfigError: no GPU, or the system pins nothing.
        """
        _require_device("cuda:0", cuda)
        super().__init__(num_slots, slot_bytes)
        self._cuda = cuda
        self._lock = threading.Lock()
        self._pinned: dict[int, Tensor] = {}
        try:
            self.tensor(0)  # better now than at the first request
        except ExpertReadError as error:
            raise ConfigError(f"config field experts.ram_tier: {error.message}") from error

    def tensor(self, slot: int) -> Tensor:
        """[slot_bytes] uint8, page-locked.

        Raises:
            ExpertReadError: the system pins no more; says how much it has.
        """
        with self._lock:
            known = self._pinned.get(slot)
            if known is not None:
                return known
            memory = torch.frombuffer(super().view(slot), dtype=torch.uint8)
            code = self._cuda.pin(memory)
            if code != 0 or not self._cuda.is_pinned(memory):
                raise ExpertReadError(
                    f"{self.slot_bytes} bytes could not be page-locked beside {len(self._pinned) * self.slot_bytes} "
                    f"(CUDA error {code}); lower experts.ram_tier, or raise the limit of locked memory (ulimit -l)"
                )
            self._pinned[slot] = memory
            return memory

    def view(self, slot: int) -> memoryview:
        self.tensor(slot)
        return super().view(slot)

    def release(self, slot: int) -> None:
        """Give a slot's memory back; no copy from it may be under way."""
        with self._lock:
            memory = self._pinned.pop(slot, None)
            if memory is not None:  # first: pages taken back while locked would not be those the GPU reads
                self._cuda.unpin(memory)
        super().release(slot)

    def close(self) -> None:
        """Unlock all; no copy may be under way."""
        with self._lock:
            for memory in self._pinned.values():
                self._cuda.unpin(memory)
            self._pinned.clear()


class CudaArena:
    """DEVICE: slots in the memory of one GPU, all taken at the start; had as tensors, not as bytes of this process."""

    def __init__(self, num_slots: int, slot_bytes: int, device: str, cuda: CudaApi) -> None:
        """Raises:
        ConfigError: no such GPU, or it has not so much memory.
        """
        _require_device(device, cuda)
        self.max_slots = num_slots
        self.slot_bytes = slot_bytes
        self.device = device
        self._cuda = cuda
        try:
            self.bytes = cuda.allocate(num_slots * slot_bytes, device)
        except RuntimeError as error:
            raise ConfigError(
                f"config field experts.cache: {num_slots * slot_bytes} bytes do not fit on {device}: {error}; give less"
            ) from error
        self._filled: dict[int, torch.cuda.Event] = {}
        self._used: dict[int, torch.cuda.Event] = {}

    def tensor(self, slot: int) -> Tensor:
        """[slot_bytes] uint8 on the GPU; views of it are the matrices."""
        return self.bytes[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def begin_use(self, slot: int) -> None:
        """Call before kernels that read the slot are begun, in the stream that computes."""
        filled = self._filled.get(slot)
        if filled is not None:
            self._cuda.current_stream(self.device).wait_event(filled)

    def end_use(self, slot: int) -> None:
        """Call after kernels that read the slot were begun, before the store may give it away."""
        used = self._cuda.new_event()
        used.record(self._cuda.current_stream(self.device))
        self._used[slot] = used

    def begin_fill(self, slot: int, stream: torch.cuda.Stream) -> None:
        """What `stream` copies into the slot from here on waits for the kernels that read it."""
        used = self._used.get(slot)
        if used is not None:
            stream.wait_event(used)

    def end_fill(self, slot: int, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """The end of what `stream` was told to copy into the slot so far."""
        filled = self._cuda.new_event()
        filled.record(stream)
        self._filled[slot] = filled
        return filled

    def release(self, slot: int) -> None:
        """Nothing: GPU memory is one allocation."""


class CudaLink:
    """From pinned RAM to the GPU, in a stream of its own, a chunk at a time."""

    tier = Tier.RAM

    def __init__(
        self, source: PinnedArena, target: CudaArena, slot_of: Callable[[int], int | None], cuda: CudaApi
    ) -> None:
        """Args: slot_of: where in `source` an expert is, None if it is not there."""
        assert source.slot_bytes == target.slot_bytes
        self._source, self._target, self._slot_of, self._cuda = source, target, slot_of, cuda
        self._chunk_bytes = -(-source.slot_bytes // _CHUNKS)
        self._lock = threading.Lock()
        self._stream = cuda.new_stream(target.device)
        cuda.keep_until_done(target.bytes, self._stream)  # its allocator knows only the stream it was made in

    def has(self, index: int) -> bool:
        return self._slot_of(index) is not None

    def num_chunks(self, index: int) -> int:
        return _CHUNKS

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        source_slot = self._slot_of(index)
        assert source_slot is not None, "the store keeps it there while it is copied"
        start, stop = chunk * self._chunk_bytes, min((chunk + 1) * self._chunk_bytes, self._source.slot_bytes)
        source, target = self._source.tensor(source_slot)[start:stop], self._target.tensor(slot)[start:stop]
        try:
            with self._lock:  # events must stand in the order of the copies
                self._target.begin_fill(slot, self._stream)
                with self._cuda.inside(self._stream):
                    target.copy_(source, non_blocking=True)
                filled = self._target.end_fill(slot, self._stream)
            filled.synchronize()
        except RuntimeError as error:  # what torch makes of CUDA's errors
            raise ExpertReadError(f"copying an expert to {self._target.device} failed: {error}") from error
        return stop - start

    def close(self) -> None:
        """Wait for copies under way; arenas belong to the store."""
        self._stream.synchronize()


def _require_device(device: str, cuda: CudaApi) -> None:
    """Raises:
    ConfigError: there is no such GPU.
    """
    kind, _, number = device.partition(":")
    count = cuda.count()
    if kind != "cuda" or not number.isdecimal() or int(number) >= count:
        raise ConfigError(f"device {device}: this process can use {count} CUDA devices; use cpu, or install a driver")


def _cudart() -> Any:
    return torch.cuda.cudart()
