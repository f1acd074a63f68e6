"""What the step under way waits for: missing experts on their way up, in the order they are to be computed.

Knows stages and experts as indices; knows no layers' mathematics. All under the store's lock, except that waiting gives
it up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from actors.experts.memory.stage import MemoryStage
from actors.experts.memory.transfers import ExpertTransfer
from actors.weights.slots import SlotForm
from cluster.errors import ExpertReadError
from cluster.policies.residency import PREFETCHED
from cluster.types import Tier


class Demands:
    """Of one step at a time. waited_for: experts that were not handed out yet, in the order of demand."""

    def __init__(
        self, form: SlotForm, stages: tuple[MemoryStage, ...], lock: threading.Lock, *, timeout_s: float
    ) -> None:
        """Args: stages: from the fastest down. timeout_s: longest wait for the next expert."""
        self._form, self._stages, self._timeout_s = form, stages, timeout_s
        self._fast = stages[0].residents
        self._landed = threading.Condition(lock)
        self.waited_for: dict[int, None] = {}
        self._errors: dict[int, ExpertReadError] = {}

    def ask(self, missing: Sequence[int]) -> tuple[dict[Tier, int], int]:
        """Begin to load these, those on their way first; how many come from where, and how many were on their way."""
        found = self._fast.lookup(missing, *(stage.residents for stage in self._stages[1:]))
        sources: dict[Tier, int] = {}
        for index in [missing[place] for place in found.demand_order]:
            tier = self._tier_of(index)
            sources[tier] = sources.get(tier, 0) + 1
            self.waited_for[index] = None
        self._fast.hold(self.waited_for)  # once there, they stay until they are computed
        self.advance()
        return sources, len(found.pending)

    def wait_for_some(self) -> list[int]:
        """Those that are there, no longer waited for but still held; waits for the first.

        Raises:
            ExpertReadError: a load failed or took too long.
        """
        deadline_s = time.monotonic() + self._timeout_s
        states = self._fast.states
        while True:
            ready = [index for index in self.waited_for if states[index] >= PREFETCHED]
            if ready:
                for index in ready:
                    del self.waited_for[index]
                self.advance()
                return sorted(ready)
            for index, error in self._errors.items():
                raise self._failure(index, error.message)
            left_s = deadline_s - time.monotonic()
            self.advance()
            if left_s <= 0 or not self._landed.wait(left_s):
                index = next(iter(self.waited_for))
                raise self._failure(
                    index, f"loading it from {self._files(index)} took longer than experts.load_timeout_s"
                )

    def advance(self) -> None:
        """Bring every one as far as there are slots."""
        goes_on = True
        while goes_on:  # what was given up for one may be a slot, one stage lower, for another
            goes_on = False
            for index in self.waited_for:
                if self._fast.states[index] < PREFETCHED and index not in self._errors:
                    stage = next(stage for stage in self._stages if stage.source(index) is not None)
                    goes_on |= stage.demand(index)

    def forget(self) -> None:
        """Nobody wants the rest any more: what is under way is given up."""
        given_up, self.waited_for = self.waited_for, {}
        self._errors.clear()
        for index in given_up:
            for stage in self._stages:
                stage.give_up(index)
        self._fast.release(given_up)
        for stage in self._stages:
            stage.queue.wake()

    def on_end(self, transfer: ExpertTransfer) -> None:
        """A transfer has ended, one of these or another that had a slot."""
        if not self.waited_for:
            return
        is_ours = transfer.is_demand and transfer.index in self.waited_for
        if is_ours and transfer.error is not None and not transfer.is_cancelled:
            self._errors[transfer.index] = transfer.error
        self.advance()
        self._landed.notify_all()

    def _tier_of(self, index: int) -> Tier:
        for stage in self._stages:
            transfer = stage.queue.transfers.get(index)
            link = stage.source(index) if transfer is None else transfer.link
            if link is not None:
                return link.tier
        raise AssertionError("the last link has every expert")

    def _failure(self, index: int, reason: str) -> ExpertReadError:
        layer, expert = self._form.expert(index)
        error = ExpertReadError(f"expert {expert} of layer {layer}: {reason}")
        error.expert = (layer, expert)
        return error

    def _files(self, index: int) -> str:
        return ", ".join(self._form.files(index))
