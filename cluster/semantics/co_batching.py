"""Which waiting request joins the running ones: the one whose experts they use already, as far as age allows. Pure.

A step reads the union of the experts of its sequences, so who joins should add few: the expected number of new ones is
sum over experts of p (1 - u), p the chance that a token of the request uses the expert, u that any running one does.
Nobody is overtaken more than `max_overtaken` times: who has been goes first, in the order of arrival. First come, first
served where nothing is known, or where nobody adds at least a tenth less than the first.

Source: admission by marginal new experts is ours; ExpertFlow (arXiv 2410.17954) groups the tokens of two batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from cluster.semantics.expectation import expected_uses
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.request_mix import RequestMix

MAX_OVERTAKEN = 8
_WORTH_IT = 0.9


class Waiting(Protocol):
    """A sequence, as far as its admission goes.

    expected: [L, E] chance that a decoded token of it uses an expert, None if it came before anything was known.
    overtaken: by how many that came later; counted by `CoBatching.admit`.
    """

    expected: np.ndarray | None
    overtaken: int


class CoBatching:
    """Chooses by what the last knowledge says. mix: of all that came, for who routes requests."""

    def __init__(self, max_overtaken: int = MAX_OVERTAKEN) -> None:
        """Args: max_overtaken: 0 is first come, first served."""
        self.mix = RequestMix()
        self._max_overtaken = max_overtaken
        self._knowledge: Knowledge | None = None

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """From now on expect by this. May be called by another thread than the rest."""
        self._knowledge = knowledge

    def expect(self, embedding: bytes, num_open: int) -> np.ndarray | None:
        """[L, E] what a token of a request that has come is expected to use; None as long as nothing is known.

        Args: num_open: requests that are here already.
        """
        knowledge = self._knowledge
        if knowledge is None:
            return None
        uses = expected_uses(knowledge, embedding)
        self.mix.note(uses.reshape(-1), num_open)
        return uses

    def choose(self, waiting: Sequence[Waiting], running: Sequence[Waiting]) -> int:
        """Place of who joins next. Args: waiting: in the order in which they came, at least one."""
        unused: np.ndarray | None = None  # [L, E] chance that no running one uses an expert
        for item in running:
            if item.expected is not None:
                left = 1 - np.minimum(item.expected, 1)
                unused = left if unused is None else unused * left
        if unused is None:
            return 0
        best, least = 0, np.inf  # of new ones
        for place, item in enumerate(waiting):
            if item.overtaken >= self._max_overtaken:
                return place
            num_new = 0.0 if item.expected is None else float(np.vdot(item.expected, unused))
            if num_new < least:
                best, least = place, num_new if place else _WORTH_IT * num_new
        return best

    def admit(self, waiting: Iterable[Waiting], place: int) -> None:
        """The one at `place` joins: those before it are overtaken."""
        for item in islice(waiting, place):
            item.overtaken += 1
