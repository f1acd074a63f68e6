"""What a prompt means, in 64 bytes: the mean embedding of its distinct tokens, of unit length, as int8. Pure.

Each token counts once, however often it comes: repeated ones are mostly those that every text has (the reason of
Arora et al. 2017 for weighing tokens down by frequency, without a table of frequencies).

The tokens' embeddings are the model's own, reduced (embedding_table.py), so that a front end holds V * 64 bytes and any
process can compare two prompts by one product. No text can be read back from it, but it says what a prompt is about:
it leaves a process only to workers of the same cluster and, as a bounded sample, to the store that they share.

Shapes: V tokens of the vocabulary, P <= 64 numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_DIMS = 64
_MAX_TOKENS = 4096  # of a longer prompt that many are read, evenly spread: bounded time on the event loop
_UNIT = 127.0


@dataclass(frozen=True, slots=True, eq=False)
class TokenEmbeddings:
    """table_VP: int8. scale_P: float32; table * scale is the reduced embedding of a token."""

    table_VP: np.ndarray
    scale_P: np.ndarray

    def embed(self, prompt_ids: Sequence[int]) -> bytes:
        """P int8 numbers: the mean of the distinct tokens' embeddings over its length, times 127; empty without one.

        Tokens that the table does not have are left out.
        """
        ids = np.asarray(prompt_ids[:: -(-len(prompt_ids) // _MAX_TOKENS)] if prompt_ids else (), dtype=np.int64)
        ids = np.unique(ids[(ids >= 0) & (ids < len(self.table_VP))])
        mean = self.table_VP[ids].sum(axis=0, dtype=np.int64) * self.scale_P
        length = float(np.linalg.norm(mean))
        return np.rint(mean * (_UNIT / length)).astype(np.int8).tobytes() if length else b""


def unit_vector(embedding: bytes) -> np.ndarray:
    """(P,) float32 of unit length; (0,) of an empty embedding, and of one of zeros."""
    vector = np.frombuffer(embedding, dtype=np.int8).astype(np.float32)
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length else vector[:0]


def unit_vectors(embeddings: Sequence[bytes]) -> np.ndarray:
    """(N, P) float32 of unit length. Those of another size than the last, and those without direction, are left out."""
    vectors = [unit_vector(embedding) for embedding in embeddings]
    size = next((len(vector) for vector in reversed(vectors) if len(vector)), 0)
    kept = [vector for vector in vectors if size and len(vector) == size]
    return np.stack(kept) if kept else np.empty((0, size), dtype=np.float32)
