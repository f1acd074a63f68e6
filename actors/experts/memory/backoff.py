"""When a read ahead that failed may be tried again: later each time, by expert and by the file that it comes from.

A disk that fails is asked more and more rarely, and not by all its experts at once. Whoever waits for an expert is not
held back: a demand always tries. Knows indices, names and a clock that is told; knows no reads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np

from cluster.errors import ExpertReadError

FIRST_S = 0.25
LONGEST_S = 30.0


class _Troubles:
    """Of N experts, or of N files: failures in a row, and until when nothing is tried. Seconds of the clock."""

    def __init__(self, number: int) -> None:
        self.num_failures = np.zeros(number, dtype=np.int64)
        self.until_s = np.zeros(number)

    def failed(self, index: int, now_s: float, share: float) -> None:
        """Args: share: of the longest wait, drawn."""
        if self.until_s[index] > now_s:  # one of several that were under way together: one failure
            return
        self.num_failures[index] += 1
        longest_s = min(LONGEST_S, FIRST_S * 2.0 ** min(int(self.num_failures[index]) - 1, 16))
        self.until_s[index] = now_s + longest_s * share

    def succeeded(self, index: int) -> None:
        self.num_failures[index] = 0
        self.until_s[index] = 0.0


class ReadBackoff:
    """What has failed ahead of need and may not be tried now. Shapes: N experts.

    errors: of experts that failed, the newest last; an expert leaves when it has come.
    """

    def __init__(
        self, files: Sequence[object], *, now_s: Callable[[], float] = monotonic, seed: int | None = None
    ) -> None:
        """Args: files: [N], what each expert is read from. seed: None draws one."""
        numbers = {file: number for number, file in enumerate(dict.fromkeys(files))}
        self.errors: dict[int, ExpertReadError] = {}
        self._file_N = np.array([numbers[file] for file in files], dtype=np.int64)
        self._experts, self._files = _Troubles(len(files)), _Troubles(len(numbers))
        self._now_s = now_s
        self._random = random.Random(seed)

    def failed(self, index: int, error: ExpertReadError) -> None:
        """A read ahead has failed."""
        self.errors.pop(index, None)
        self.errors[index] = error
        now_s = self._now_s()
        for troubles, at in ((self._experts, index), (self._files, self._file_N[index])):
            # Half of a wait is drawn, so that processes which share a disk do not ask together.
            troubles.failed(at, now_s, 0.5 + 0.5 * self._random.random())

    def succeeded(self, index: int) -> None:
        """An expert came, ahead of need or not: it and its file are well."""
        if self.errors:
            self.errors.pop(index, None)
            self._experts.succeeded(index)
            self._files.succeeded(self._file_N[index])

    def try_now(self) -> None:
        """Somebody asks in so many words: everything may be tried once; what fails again waits the longer."""
        self._experts.until_s[:] = 0.0
        self._files.until_s[:] = 0.0

    def held(self) -> np.ndarray | None:
        """[N] bool: which may not be read ahead now, for themselves or because their file has failed others; None:
        nothing has failed."""
        return self._until_s() > self._now_s() if self.errors else None

    def waiting(self) -> dict[int, ExpertReadError]:
        """Experts that failed and may not be tried now, and why they failed."""
        held = self.held()
        return {} if held is None else {index: error for index, error in self.errors.items() if held[index]}

    def problem(self) -> str | None:
        """In words, for people; None while nothing has failed."""
        if not self.errors:
            return None
        index, error = next(reversed(self.errors.items()))
        wait_s = max(0.0, self._until_s()[index] - self._now_s())
        return (
            f"reading {len(self.errors)} experts ahead of need failed, up to {self._experts.num_failures.max()} times "
            f"in a row; tried again in {wait_s:.1f} s: {error.message}"
        )

    def _until_s(self) -> np.ndarray:
        return np.maximum(self._experts.until_s, self._files.until_s[self._file_N])
