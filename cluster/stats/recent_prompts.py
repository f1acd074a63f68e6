"""Bounds on the sample of prompts' embeddings that a store keeps, the same in every store.

It holds what clusters are fitted to, and no more: 64 bytes a prompt, which say what it is about and not what it says,
of the last MAX_PROMPTS that workers sent, for a day.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PROMPTS = 1024
MAX_EMBEDDING_BYTES = 64
PROMPTS_TTL_S = 86_400.0


def checked_prompts(prompts: Sequence[bytes]) -> list[bytes]:
    """The last MAX_PROMPTS of them that are not empty.

    Raises:
        ValueError: one is longer than an embedding may be.
    """
    longest = max(map(len, prompts), default=0)
    if longest > MAX_EMBEDDING_BYTES:
        raise ValueError(f"a prompt's embedding of {longest} bytes; at most {MAX_EMBEDDING_BYTES} are kept")
    return [prompt for prompt in prompts if prompt][-MAX_PROMPTS:]
