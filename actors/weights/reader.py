"""Reads experts from checkpoint files into memory without leaving a second copy in the page cache.

Knows files, offsets and alignment; knows nothing of caches or policies. O_DIRECT where the file
system takes it (probed with a real read), else buffered reads whose pages are dropped at once.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ExpertReadError
from cluster.model.safetensors_index import TensorRef

PAGE_BYTES = 4096
_CHUNKS_PER_EXPERT = 3
_MIN_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Segment:
    """A page-aligned range of a file and where it goes in the expert's slot; from `data_end` on nothing is needed."""

    file: Path
    file_offset: int
    num_bytes: int
    slot_offset: int
    data_end: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How one expert is read: aligned segments, the same in chunks, and where each matrix begins in the slot."""

    segments: tuple[Segment, ...]
    chunks: tuple[Segment, ...]
    part_offsets: tuple[int, ...]
    slot_bytes: int


def plan_read(parts: Iterable[TensorRef]) -> ReadPlan:
    """Cover `parts` with page-aligned segments; parts adjacent in a file share one segment."""
    refs = list(parts)
    segments: list[Segment] = []
    offsets = [0] * len(refs)
    for i in sorted(range(len(refs)), key=lambda i: (str(refs[i].file), refs[i].offset)):
        ref = refs[i]
        end = ref.offset + ref.num_bytes
        start, stop = _align_down(ref.offset), _align_up(end)
        last = segments[-1] if segments else None
        if last is not None and last.file == ref.file and start <= last.file_offset + last.num_bytes:
            num_bytes = max(stop - last.file_offset, last.num_bytes)
            data_end = max(end, last.data_end)
            segments[-1] = Segment(ref.file, last.file_offset, num_bytes, last.slot_offset, data_end)
        else:
            segments.append(Segment(ref.file, start, stop - start, _slot_end(segments), end))
        offsets[i] = segments[-1].slot_offset + ref.offset - segments[-1].file_offset
    return ReadPlan(tuple(segments), tuple(_chunks(segments)), tuple(offsets), _slot_end(segments))


def _chunks(segments: list[Segment]) -> Iterator[Segment]:
    size = max(_MIN_CHUNK_BYTES, _align_up(-(-_slot_end(segments) // _CHUNKS_PER_EXPERT)))
    for whole in segments:
        for start in range(0, whole.num_bytes, size):
            num_bytes = min(size, whole.num_bytes - start)
            yield Segment(whole.file, whole.file_offset + start, num_bytes, whole.slot_offset + start, whole.data_end)


class ExpertReader:
    """Opens each checkpoint file once; `read` may be called from several threads."""

    def __init__(self, files: Iterable[Path], *, direct_io: bool = True) -> None:
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._paths = sorted(set(files))
        self.mode = "O_DIRECT"
        try:
            self._fds = _open_all(self._paths, direct=True) if direct_io else {}
        except OSError:
            self._fds = {}
        if not self._fds:
            self.mode = "buffered, page cache dropped"
            self._fds = _open_all(self._paths, direct=False)
        for fd in self._fds.values():  # what others (or the dense weights' loader) left in the page cache
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def bytes_read(self) -> int:
        """Bytes asked from the operating system since start."""
        return self._bytes_read

    def read(self, segment: Segment, slot: memoryview) -> int:
        """Fill a segment's part of `slot` (page-aligned, as large as the plan says); bytes read.

        Raises:
            ExpertReadError: the file is gone, shorter than at start, or the disk failed; names the file.
        """
        view = slot[segment.slot_offset : segment.slot_offset + segment.num_bytes]
        num_bytes = self._read_range(segment.file, segment.file_offset, view, segment.data_end)
        with self._lock:
            self._bytes_read += num_bytes
        return num_bytes

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def _read_range(self, file: Path, offset: int, view: memoryview, data_end: int) -> int:
        fd, done = self._fds[file], 0
        wanted = min(len(view), data_end - offset)  # the aligned tail of the last tensor may reach past the file's end
        try:
            while done < wanted:
                got = os.preadv(fd, [view[done:]], offset + done)
                if got == 0:
                    break
                done += got
            if self.mode != "O_DIRECT":
                os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ExpertReadError(f"{file}: reading {len(view)} bytes at {offset} failed: {error}") from error
        if done < wanted:
            raise ExpertReadError(
                f"{file}: shorter than its header says: wanted {wanted} bytes at {offset}, got {done}"
            )
        return done


def _open_all(paths: list[Path], *, direct: bool) -> dict[Path, int]:
    """Raises OSError, with no file left open: one is missing, or its file system refuses O_DIRECT."""
    fds: dict[Path, int] = {}
    try:
        for path in paths:
            fds[path] = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
            if direct:
                with mmap.mmap(-1, PAGE_BYTES) as probe:  # anonymous maps are page-aligned, as O_DIRECT wants
                    os.preadv(fds[path], [probe], 0)
            else:  # no read-ahead: what was not asked for would stay in the page cache
                os.posix_fadvise(fds[path], 0, 0, os.POSIX_FADV_RANDOM)
    except OSError:
        for fd in fds.values():
            os.close(fd)
        raise
    return fds


def _slot_end(segments: list[Segment]) -> int:
    return segments[-1].slot_offset + segments[-1].num_bytes if segments else 0


def _align_down(value: int) -> int:
    return value - value % PAGE_BYTES


def _align_up(value: int) -> int:
    return -(-value // PAGE_BYTES) * PAGE_BYTES
