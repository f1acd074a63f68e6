"""One sequence over the workers it is given to, one after the other: what it has said, and whether to try again.

Pure: a clock's readings come in, waits and requests go out. `actors/ray_shells/worker_client.py` does what it says.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cluster.errors import MoesaicError, Overloaded, Unavailable, WorkerLost
from cluster.types import GenerationRequest, RequestId, TokenChunk

PATIENCE_S = 60.0  # without any worker that takes it; the request's own deadline may come before
MAX_LOST_AT_ONCE = 2  # workers in a row that were lost before they said a token

_FIRST_WAIT_S = 0.05
_LONGEST_WAIT_S = 1.0


class Attempts:
    """What the front end holds of a sequence, so that any worker can go on with it.

    Sampling noise is keyed by (seed, choice, token index), so the next worker draws what the lost one would have. Each
    attempt has an id of its own: late tokens of an earlier one are nobody's.
    """

    def __init__(self, request: GenerationRequest, *, now_s: float) -> None:
        """Args: now_s: seconds of any steady clock, as in the other calls."""
        self.request = request
        self._first_id = request.request_id
        self._emitted: list[int] = list(request.emitted_ids)
        self._is_promised = False  # a worker had begun it: it is refused no more
        self._is_taken = False  # by a worker, in this attempt
        self._has_said = False  # this attempt, a token
        self._num_lost_at_once = 0
        self._num_waits = 0
        self._waiting_since_s = now_s

    def take(self, chunk: TokenChunk) -> None:
        """A worker has taken the sequence, or says more of it."""
        self._is_taken = True
        if chunk.token_ids:
            self._emitted += chunk.token_ids
            self._has_said = self._is_promised = True

    def retry(self, error: MoesaicError, *, now_s: float, avoid: Collection[str], draw: float = 1.0) -> float:
        """Seconds to wait before `request`, then the next attempt, is submitted.

        Args:
            error: that ended this attempt.
            avoid: ids of Serve replicas that are known to be lost or to stand still.
            draw: random, from 0 to 1: of the longest wait one half is certain and as much of the other.

        Raises:
            MoesaicError: `error`, which would come again; or why nothing more is tried.
        """
        is_lost = isinstance(error, WorkerLost) and self._is_taken
        if is_lost:
            self._is_promised = True
            self._check_poison(error)
        if isinstance(error, Overloaded) and not self._is_promised:
            raise error  # refused before any work, as it should be
        if not isinstance(error, Unavailable | Overloaded):
            raise error
        if is_lost or self._has_said:
            self._waiting_since_s, self._num_waits = now_s, 0
        waited_s = now_s - self._waiting_since_s
        if waited_s >= PATIENCE_S:
            raise Unavailable(f"no attention worker took it in {waited_s:.0f} s; the last one: {error}") from error
        attempt = self.request.attempt + 1
        self.request = replace(
            self.request,
            request_id=RequestId(f"{self._first_id}+{attempt}"),
            emitted_ids=tuple(self._emitted),
            attempt=attempt,
            avoid=tuple(sorted(avoid)),
        )
        self._is_taken = self._has_said = False
        self._num_waits += 1
        if self._num_waits == 1:
            return 0.0
        return min(_FIRST_WAIT_S * 2 ** (self._num_waits - 2), _LONGEST_WAIT_S) * (0.5 + 0.5 * draw)

    def _check_poison(self, error: MoesaicError) -> None:
        """A sequence that takes its worker down with it must not take the next one.

        Raises:
            MoesaicError: it has done so too often.
        """
        self._num_lost_at_once = 0 if self._has_said else self._num_lost_at_once + 1
        if self._num_lost_at_once >= MAX_LOST_AT_ONCE:
            raise MoesaicError(
                f"{self._num_lost_at_once} attention workers in a row were lost before they said a token of this "
                f"request; it is not given to another one"
            ) from error
