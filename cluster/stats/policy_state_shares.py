"""Bounds on what workers leave for each other of what they learned, the same in every store.

A store keeps at most MAX_SHARES * MAX_SHARE_BYTES (64 MiB) for each model and kind of state, whatever the number of
workers and restarts.
"""

from __future__ import annotations

MAX_SHARES = 8
"""Workers whose shares are kept, those that published last: more would add little."""

MAX_SHARE_BYTES = 8 * 2**20
"""Of one share, compressed."""

SHARE_TTL_S = 86_400.0
"""A share that is not published again is forgotten."""


def check_size(name: str, blob: bytes) -> None:
    """Raise `ValueError` if a share is larger than may be."""
    if len(blob) > MAX_SHARE_BYTES:
        raise ValueError(f"a share of {name} of {len(blob)} bytes; at most {MAX_SHARE_BYTES} are kept")
