"""How often each token has been in a sequence: what penalties are computed from.

Knows token ids; knows no logits. Grows by one token a step and holds distinct tokens only, so that a penalised
sequence costs what it has said and not the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

_FIRST_CAPACITY = 64


class TokenCounts:
    """Distinct tokens of one sequence, with how often each was generated (0: it is in the prompt alone)."""

    def __init__(self, prompt_ids: Iterable[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self._ids = np.empty(_FIRST_CAPACITY, dtype=np.int64)
        self._generated = np.empty(_FIRST_CAPACITY, dtype=np.int64)
        for token_id in prompt_ids:
            self._place_of(token_id)

    @property
    def ids(self) -> np.ndarray:
        """Distinct token ids, in order of first appearance; a view, valid until the next token."""
        return self._ids[: len(self._place)]

    @property
    def generated(self) -> np.ndarray:
        """How often each of `ids` was generated."""
        return self._generated[: len(self._place)]

    def add(self, token_ids: Sequence[int]) -> None:
        """Count generated tokens."""
        for token_id in token_ids:
            self._generated[self._place_of(token_id)] += 1

    def _place_of(self, token_id: int) -> int:
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = len(self._place)
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._generated = np.concatenate((self._generated, np.empty_like(self._generated)))
            self._ids[place], self._generated[place] = token_id, 0
        return place
