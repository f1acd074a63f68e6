"""What workers expect of experts that live in hosts: said in few bytes, and joined where several workers say it. Pure.

A worker's policies value every expert, and name those to fetch ahead. Each host hears of the experts that it is asked
for. Values are quantised to a byte between the least and the largest; what is fetched ahead is a short list. A host
adds up what its workers say: expected uses add. What was said long ago counts less, and after a while nothing: a worker
that died or fell silent leaves no wishes behind.

Shapes: N = L * E flat experts of the grid; n of these that one host is asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from cluster.errors import InvalidRequest

HALF_LIFE_S = 0.5
"""After which what a worker said counts half. A step takes 5 to 500 ms; a worker speaks at least once in each."""

_FORGOTTEN = 8  # half-lives
_MAX_SPEAKERS = 512
_LEVELS = 255
# magic, what is said and how wide indices are, how many to fetch ahead; then: least and largest value, largest priority
_HEADER, _RANGE, _MOST = struct.Struct("<BBH"), struct.Struct("<ff"), struct.Struct("<f")
_MAGIC = 0xE0
_VALUES, _AHEAD, _WIDE = 1, 2, 4
_MAX_AHEAD = 2**16 - 1


@dataclass(frozen=True, slots=True, eq=False)
class ExpertOutlook:
    """values: [N] float32, what experts are worth; 0 for those that are not spoken of. None: as was said before.

    ahead: [N] float32, what to fetch, larger first; 0 is not fetched. None: as was said before.
    """

    values: np.ndarray | None
    ahead: np.ndarray | None


def encode_outlook(of_host: np.ndarray, values: np.ndarray | None, ahead: np.ndarray | None) -> bytes:
    """An outlook for one host. Args: of_host: [N] bool, its experts. values, ahead: [N], as in ExpertOutlook.

    >>> of_host = np.array([True, False, True, True])
    >>> data = encode_outlook(of_host, np.array([0.0, 9.0, 1.0, 2.0]), np.array([0.0, 1.0, 0.0, 0.5]))
    >>> heard = decode_outlook(data, 4)
    >>> heard.values.round(2).tolist(), heard.ahead.tolist()
    ([0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.5])
    """
    said = _WIDE if len(of_host) > 2**16 else 0
    wanted = np.zeros(0, np.int64)
    parts: list[bytes] = []
    if values is not None and of_host.any():
        said |= _VALUES
        own = values[of_host].astype(np.float32)
        low, high = float(own.min()), float(own.max())
        levels = np.rint((own - low) * (_LEVELS / (high - low) if high > low else 0.0)).astype(np.uint8)
        parts += [_RANGE.pack(low, high), np.packbits(of_host).tobytes(), levels.tobytes()]
    if ahead is not None:
        said |= _AHEAD
        wanted = np.flatnonzero(of_host & (ahead > 0))
        if len(wanted) > _MAX_AHEAD:
            wanted = np.sort(wanted[np.argsort(-ahead[wanted], kind="stable")[:_MAX_AHEAD]])
    if ahead is not None and len(wanted):
        most = float(ahead[wanted].max())
        levels = np.maximum(np.rint(ahead[wanted] * (_LEVELS / most)), 1).astype(np.uint8)
        parts += [_MOST.pack(most), wanted.astype(_index_type(said)).tobytes(), levels.tobytes()]
    return b"".join([_HEADER.pack(_MAGIC, said, len(wanted)), *parts])


def decode_outlook(data: bytes | memoryview, size: int) -> ExpertOutlook:
    """Inverse of `encode_outlook`, but for the rounding. Args: size: N.

    Raises:
        InvalidRequest: it is none, or one of another model.
    """
    try:
        magic, said, num_wanted = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise InvalidRequest(f"{len(data)} bytes that are no outlook")
        at, values = _HEADER.size, None
        if said & _VALUES:
            low, high = _RANGE.unpack_from(data, at)
            mask = np.unpackbits(np.frombuffer(data, np.uint8, -(-size // 8), at + _RANGE.size))
            at += _RANGE.size + -(-size // 8)
            levels = np.frombuffer(data, np.uint8, int(mask.sum()), at)
            at += len(levels)
            if mask[size:].any() or not np.isfinite((low, high)).all():
                raise InvalidRequest(f"an outlook that does not fit {size} experts")
            values = np.zeros(size, np.float32)
            values[mask[:size].astype(np.bool_)] = low + levels * np.float32((high - low) / _LEVELS)
        ahead = np.zeros(size, np.float32) if said & _AHEAD else None
        if num_wanted:
            (most,) = _MOST.unpack_from(data, at)
            wanted = np.frombuffer(data, _index_type(said), num_wanted, at + _MOST.size)
            at += _MOST.size + wanted.nbytes
            levels = np.frombuffer(data, np.uint8, num_wanted, at)
            at += len(levels)
            if ahead is None or (wanted >= size).any() or not np.isfinite(most):
                raise InvalidRequest(f"an outlook that does not fit {size} experts")
            ahead[wanted] = levels * np.float32(most / _LEVELS)
    except (struct.error, ValueError) as error:
        raise InvalidRequest(f"{len(data)} bytes that are no outlook on {size} experts") from error
    if at != len(data):
        raise InvalidRequest(f"an outlook of {len(data)} bytes that does not fit {size} experts")
    return ExpertOutlook(values, ahead)


def _index_type(said: int) -> np.dtype:
    return np.dtype("<u4" if said & _WIDE else "<u2")


@dataclass(slots=True)
class _Speaker:
    """said_s: of the values and of what is to be fetched, apart: a worker need not say both."""

    values: np.ndarray
    ahead: np.ndarray
    values_s: float
    ahead_s: float


class JoinedOutlook:
    """What all workers of one host say. Bounded: of more than 512 workers the longest silent one is forgotten.

    >>> joined = JoinedOutlook(2)
    >>> joined.hear("a", ExpertOutlook(np.array([1.0, 0.0], np.float32), np.zeros(2, np.float32)), now_s=0.0)
    >>> joined.hear("b", ExpertOutlook(np.array([1.0, 3.0], np.float32), np.ones(2, np.float32)), now_s=0.5)
    >>> joined.at(0.5)[0].tolist()  # what the first said counts half by now
    [1.5, 3.0]
    >>> joined.forget("b")
    >>> joined.at(0.5)[1].tolist()
    [0.0, 0.0]
    """

    def __init__(self, size: int, half_life_s: float = HALF_LIFE_S) -> None:
        """Args: size: N."""
        self.size, self._half_life_s = size, half_life_s
        self._speakers: dict[Hashable, _Speaker] = {}

    @property
    def num_speakers(self) -> int:
        """Workers that are remembered."""
        return len(self._speakers)

    def hear(self, worker: Hashable, outlook: ExpertOutlook, now_s: float) -> None:
        """A worker says this now, instead of what it said before."""
        speaker = self._speakers.pop(worker, None)  # those that spoke last are last
        if speaker is None:
            zeros = np.zeros(self.size, np.float32)
            speaker = _Speaker(zeros, zeros, now_s, now_s)
            if len(self._speakers) >= _MAX_SPEAKERS:
                del self._speakers[next(iter(self._speakers))]
        if outlook.values is not None:
            speaker.values, speaker.values_s = outlook.values, now_s
        if outlook.ahead is not None:
            speaker.ahead, speaker.ahead_s = outlook.ahead, now_s
        self._speakers[worker] = speaker

    def forget(self, worker: Hashable) -> None:
        """A worker is gone."""
        self._speakers.pop(worker, None)

    def at(self, now_s: float) -> tuple[np.ndarray, np.ndarray]:
        """The sums of the values and of what is to be fetched, by their age: [N] each."""
        values, ahead = np.zeros(self.size, np.float32), np.zeros(self.size, np.float32)
        for worker, speaker in list(self._speakers.items()):
            ages = (now_s - speaker.values_s) / self._half_life_s, (now_s - speaker.ahead_s) / self._half_life_s
            if min(ages) > _FORGOTTEN:
                del self._speakers[worker]
                continue
            values += speaker.values * np.float32(0.5 ** ages[0])
            ahead += speaker.ahead * np.float32(0.5 ** ages[1])
        return values, ahead


class ByteShare:
    """Keeps what is said beside the data plane below a share of its bytes.

    >>> share = ByteShare(0.03)
    >>> share.note_frames(10_000)
    >>> share.take(200), share.take(200)
    (True, False)
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.frame_bytes = self.taken_bytes = 0

    def note_frames(self, num_bytes: int) -> None:
        """So many bytes of frames and answers went."""
        self.frame_bytes += num_bytes

    def take(self, num_bytes: int, *, spare: int = 0) -> bool:
        """Whether so many more may be said now; if so they are counted. Args: spare: that must be left then."""
        if self.taken_bytes + num_bytes + spare > self._share * self.frame_bytes:
            return False
        self.taken_bytes += num_bytes
        return True
