"""What a request forbids and favours among tokens, prepared once for its sequence.

A step then costs what the rules say of one token, not how long the client's lists are: ids are distinct and in arrays,
bad words are found by the token before their last. Knows token ids; knows no logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from cluster.types import SamplingParams


@dataclass(frozen=True, slots=True)
class TokenRules:
    """allowed: int64, distinct, ascending; None allows all. bias: ids (int64) and what is added (float32), or None.

    never: tokens that are bad words by themselves. words_by_token: longer bad words, by the token before their last.
    """

    allowed: np.ndarray | None
    bias: tuple[np.ndarray, np.ndarray] | None
    never: tuple[int, ...]
    words_by_token: dict[int, tuple[tuple[int, ...], ...]]

    @classmethod
    def of(cls, params: SamplingParams) -> TokenRules | None:
        """None where the request says nothing of tokens."""
        if not (params.allowed_token_ids or params.logit_bias or params.bad_words):
            return None
        allowed = bias = None
        if params.allowed_token_ids:
            allowed = np.unique(np.asarray(params.allowed_token_ids, dtype=np.int64))
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            bias = np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
        words: dict[int, list[tuple[int, ...]]] = {}
        for word in dict.fromkeys(params.bad_words):
            if len(word) > 1:
                words.setdefault(word[-2], []).append(word)
        return cls(
            allowed,
            bias,
            tuple(dict.fromkeys(word[0] for word in params.bad_words if len(word) == 1)),
            {token: tuple(longer) for token, longer in words.items()},
        )

    def banned(self, generated: Seq[int]) -> tuple[int, ...]:
        """Tokens that would complete a bad word now. Args: generated: the tokens so far, or the last of them."""
        longer = self.words_by_token.get(generated[-1], ()) if generated else ()
        completed = (word[-1] for word in longer if tuple(generated[-(len(word) - 1) :]) == word[:-1])
        return (*self.never, *completed)
