"""Reading experts: aligned, merged, the right bytes in every mode, and nothing left in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from expert_builders import ExpertFile, write_experts
from hypothesis import given, settings

from actors.weights.reader import PAGE_BYTES, ExpertReader, plan_read
from cluster.errors import ExpertReadError
from cluster.model.safetensors_index import TensorRef
from cluster.types import ExpertId

FILE, OTHER = Path("a.safetensors"), Path("b.safetensors")


def _ref(offset: int, num_bytes: int, file: Path = FILE) -> TensorRef:
    return TensorRef("t", file, "U8", (num_bytes,), offset, num_bytes)


def _page_cache_is_observable(file: Path) -> bool:
    _drop_cached_pages(file)
    return not any(_cached_pages(file))


def _drop_cached_pages(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _cached_pages(file: Path) -> list[bool]:
    """Which pages of the file the operating system holds in memory."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        num_pages = -(-len(mapped) // PAGE_BYTES)
        states = (ctypes.c_ubyte * num_pages)()
        start = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), states)
        del start
    if failed:
        pytest.skip("mincore is refused here")
    return [bool(state & 1) for state in states]


def _parts_of(reader: ExpertReader, file: ExpertFile, expert: ExpertId) -> list[bytes]:
    parts = file.layout.experts[expert].parts
    plan = plan_read(parts)
    slot = mmap.mmap(-1, plan.slot_bytes)
    for chunk in plan.chunks:
        reader.read(chunk, memoryview(slot))
    return [slot[at : at + part.num_bytes] for at, part in zip(plan.part_offsets, parts, strict=True)]


def _expected(file: ExpertFile, expert: ExpertId) -> list[bytes]:
    matrices = file.experts[expert]
    return [m.reshape(-1).view(torch.uint8).numpy().tobytes() for m in (matrices.gate, matrices.up, matrices.down)]


def test_adjacent_parts_share_one_segment() -> None:
    plan = plan_read([_ref(8192, 5000), _ref(13192, 5000), _ref(18192, 5000)])

    assert [(s.file_offset, s.num_bytes, s.slot_offset) for s in plan.segments] == [(8192, 16384, 0)]
    assert plan.part_offsets == (0, 5000, 10000)
    assert plan.slot_bytes == 16384


def test_parts_in_neighbouring_pages_share_a_segment_and_distant_ones_do_not() -> None:
    plan = plan_read([_ref(100, 50), _ref(4096, 10), _ref(50000, 100)])

    assert [(s.file_offset, s.num_bytes, s.slot_offset) for s in plan.segments] == [(0, 8192, 0), (49152, 4096, 8192)]
    assert plan.part_offsets == (100, 4096, 8192 + 848)


def test_parts_keep_their_order_whatever_their_order_in_the_file() -> None:
    plan = plan_read([_ref(9000, 10), _ref(0, 10), _ref(4500, 10)])

    assert len(plan.segments) == 1
    assert plan.part_offsets == (9000, 0, 4500)


def test_equal_offsets_of_two_files_are_two_segments() -> None:
    plan = plan_read([_ref(0, 10), _ref(10, 10, OTHER), _ref(10, 10)])

    assert [s.file for s in plan.segments] == [FILE, OTHER]
    assert plan.part_offsets == (0, PAGE_BYTES + 10, 10)


@given(parts=st.lists(st.tuples(st.integers(0, 60000), st.integers(1, 9000), st.booleans()), min_size=1, max_size=6))
def test_plans_are_aligned_disjoint_and_cover_every_part(parts: list[tuple[int, int, bool]]) -> None:
    refs = [_ref(offset, size, OTHER if other else FILE) for offset, size, other in parts]

    plan = plan_read(refs)

    end = 0
    for segment in plan.segments:
        assert segment.file_offset % PAGE_BYTES == segment.num_bytes % PAGE_BYTES == 0
        assert segment.slot_offset == end
        end += segment.num_bytes
    assert plan.slot_bytes == end
    for ref, at in zip(refs, plan.part_offsets, strict=True):
        (segment,) = [s for s in plan.segments if s.slot_offset <= at < s.slot_offset + s.num_bytes]
        assert segment.file == ref.file
        assert segment.file_offset + (at - segment.slot_offset) == ref.offset
        assert at + ref.num_bytes <= segment.slot_offset + segment.num_bytes


@pytest.mark.parametrize("direct_io", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "scattered"])
@pytest.mark.parametrize("shift", [0, 1, 3001])
def test_every_expert_is_read_as_stored(tmp_path: Path, direct_io: bool, adjacent: bool, shift: int) -> None:
    """The last expert ends at the odd end of the file."""
    file = write_experts(tmp_path, adjacent=adjacent, shift=shift)
    reader = ExpertReader([file.file], direct_io=direct_io)

    for expert in file.experts:
        assert _parts_of(reader, file, expert) == _expected(file, expert)

    assert reader.bytes_read >= file.layout.stored_bytes
    if not direct_io:
        assert reader.mode.startswith("buffered")
    reader.close()


@settings(max_examples=12, deadline=None)
@given(shift=st.integers(0, 5000), sizes=st.tuples(st.integers(1, 90), st.integers(1, 60)), direct_io=st.booleans())
def test_any_sizes_and_offsets_are_read_as_stored(
    tmp_path_factory: pytest.TempPathFactory, shift: int, sizes: tuple[int, int], direct_io: bool
) -> None:
    hidden, intermediate = sizes
    file = write_experts(
        tmp_path_factory.mktemp("odd"),
        layers=1,
        num_experts=2,
        hidden=hidden,
        intermediate=intermediate,
        dtype=torch.bfloat16,
        shift=shift,
    )
    reader = ExpertReader([file.file], direct_io=direct_io)

    for expert in file.experts:
        assert _parts_of(reader, file, expert) == _expected(file, expert)
    reader.close()


@pytest.mark.parametrize("direct_io", [True, False], ids=["direct", "buffered"])
def test_reads_leave_nothing_in_the_page_cache(tmp_path: Path, direct_io: bool) -> None:
    file = write_experts(tmp_path, num_experts=16, hidden=128, intermediate=64)
    if not _page_cache_is_observable(file.file):
        pytest.skip("the page cache cannot be observed on this file system")
    reader = ExpertReader([file.file], direct_io=direct_io)

    for expert in sorted(file.experts, key=lambda e: (e.expert % 5, e.layer)):
        _parts_of(reader, file, expert)

    cached = _cached_pages(file.file)
    first = min(part.offset for tensors in file.layout.experts.values() for part in tensors.parts) // PAGE_BYTES + 1
    assert not any(cached[first:]), f"{sum(cached[first:])} of {len(cached)} pages are held twice"
    reader.close()


@pytest.mark.parametrize("direct_io", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("lost_bytes", [1, 100, 4096, 10000])
def test_file_truncated_after_start_is_an_error_that_names_it(tmp_path: Path, direct_io: bool, lost_bytes: int) -> None:
    file = write_experts(tmp_path)
    reader = ExpertReader([file.file], direct_io=direct_io)
    os.truncate(file.file, file.file.stat().st_size - lost_bytes)

    with pytest.raises(ExpertReadError, match=str(file.file)):
        _parts_of(reader, file, max(file.experts))

    assert _parts_of(reader, file, ExpertId(0, 0)) == _expected(file, ExpertId(0, 0))
    reader.close()


def test_missing_file_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.safetensors"):
        ExpertReader([tmp_path / "gone.safetensors"])


def test_a_refused_start_leaves_no_file_open(tmp_path: Path) -> None:
    file = write_experts(tmp_path)
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=r"zzz"):
        ExpertReader([file.file, tmp_path / "zzz.safetensors"])

    assert len(os.listdir("/proc/self/fd")) == before
