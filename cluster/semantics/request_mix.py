"""What the requests of a worker use together, and what of it its memory will therefore hold. Pure.

Which experts are resident at one moment says little of a batch's next hundred steps: at some hundred loads a second a
memory has changed within a few. What the requests that share it use says more: an expert is resident with the chance
1 - exp(-use * T), T such that the chances add up to the slots (Che's approximation of a cache of independent
references; Che, Tung and Wang 2002).

Shapes: N experts, layer-major.
"""

from __future__ import annotations

from typing import Self

import numpy as np

_MEMORY = 2.0  # times as many requests as are open
_ROUNDS = 4
_EDGE = 1e-6
_UNIT = 255.0


class RequestMix:
    """The requests of one worker: a moving average of what they are expected to use, open ones and as many before.

    uses: [N] chance that a token uses an expert; None before the first request.
    """

    def __init__(self, uses: np.ndarray | None = None) -> None:
        self.uses = uses
        self._time = 1.0

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """What `to_bytes` gave; empty bytes are no requests."""
        return cls(np.frombuffer(packed, dtype=np.uint8).astype(np.float32) / _UNIT if packed else None)

    def to_bytes(self) -> bytes:
        """A byte for every expert."""
        return b"" if self.uses is None else np.rint(_UNIT * np.clip(self.uses, 0, 1)).astype(np.uint8).tobytes()

    def note(self, uses: np.ndarray, num_open: float) -> None:
        """One more. Args: uses: [N] of a token; not finite, it is not noted: an average would never lose it again.
        num_open: requests there, this one not counted."""
        if not np.isfinite(uses).all():
            return
        if self.uses is None or len(self.uses) != len(uses):
            self.uses = uses.astype(np.float32)
        else:
            self.uses = self.uses + (uses - self.uses) / np.float32(1 + _MEMORY * max(num_open, 0.0))

    def residency(self, num_slots: float) -> np.ndarray | None:
        """[N] chance that an expert is resident in a memory of so many slots; None before the first request."""
        if self.uses is None:
            return None
        if num_slots >= len(self.uses) - _EDGE:
            return np.ones_like(self.uses)
        uses, time = np.maximum(self.uses, _EDGE), self._time
        for _ in range(_ROUNDS):  # Newton's, from the last solution: the requests before were nearly the same
            absent = np.exp(-uses * np.float32(time))
            excess = float((1 - absent).sum()) - num_slots
            time = max(time - excess / max(float(uses @ absent), _EDGE), time / 4)
        self._time = time
        return 1 - np.exp(-uses * np.float32(time))
