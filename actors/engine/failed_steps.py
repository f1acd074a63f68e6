"""Steps that failed one after the other: an engine that only fails looks alive by every other sign.

Knows outcomes of steps and a clock; knows nothing of what a step computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cluster.errors import codes_of

FAILING_AFTER = 5  # steps in a row; fewer may be one client's requests
_GIVEN_UP_AFTER_S = 30.0  # of failing, after which a new process may do better


class FailedSteps:
    """Of one engine. `note` is called by the engine's thread, the rest by any.

    in_a_row: steps without a single token since the last token. total: since start. last: what the newest said.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.in_a_row = 0
        self.total = 0
        self.last = ""
        self._num_grave = 0  # in a row, those that are no fault of the request's
        self._since_s: float | None = None  # it fails
        self._clock = clock

    def note(self, num_tokens: int, errors: Sequence[BaseException]) -> None:
        """A step has ended. Args: num_tokens: sequences that got one. errors: of the sequences that it ended."""
        if num_tokens:
            self.in_a_row = self._num_grave = 0
            self._since_s = None
        elif errors:
            self.in_a_row += 1
            self.total += 1
            self.last = str(errors[-1]) or repr(errors[-1])
            self._num_grave += any(codes_of(error).http >= 500 for error in errors)
            if self._since_s is None and self._num_grave >= FAILING_AFTER:
                self._since_s = self._clock()

    @property
    def is_failing(self) -> bool:
        """Whether so many steps failed that requests had better go elsewhere."""
        return self._since_s is not None

    @property
    def is_given_up(self) -> bool:
        """Whether that has lasted so long that the process is better replaced."""
        since_s = self._since_s
        return since_s is not None and self._clock() - since_s > _GIVEN_UP_AFTER_S

    @property
    def degraded(self) -> tuple[str, ...]:
        """In words; nothing once a step gave a token again."""
        if not self.in_a_row:
            return ()
        steps = "the last step" if self.in_a_row == 1 else f"{self.in_a_row} steps in a row"
        return (f"{steps} failed: {self.last}",)
