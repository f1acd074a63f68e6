"""Digests of files that were hashed before, in a cache directory of the user: hashing all bytes takes minutes.

Only what is in a directory that this user owns and nobody else can write to is believed. Without such a directory
nothing is remembered, which costs time only. Knows names and texts; knows nothing of what was hashed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from pathlib import Path

_MAX_ENTRIES = 256
_DIGEST = re.compile(r"[0-9a-f]{64}")


def recall(key: str) -> str | None:
    """What was remembered by `key`, or None."""
    directory = _directory()
    if directory is None:
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = (directory / key).read_text()
        return text if _DIGEST.fullmatch(text) else None
    return None


def remember(key: str, digest: str) -> None:
    """Keep `digest`; the oldest go when there are too many. Best effort: a full disk costs time only."""
    directory = _directory()
    if directory is None:
        return
    with contextlib.suppress(OSError):
        descriptor, name = tempfile.mkstemp(dir=directory)
        with os.fdopen(descriptor, "w") as file:
            file.write(digest)
        Path(name).replace(directory / key)  # whole or not at all
        entries = sorted(directory.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
        for entry in entries[:-_MAX_ENTRIES]:
            entry.unlink(missing_ok=True)


def _directory() -> Path | None:
    """The first place of ours that can be had."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for place in (Path(home) / "moesaic" / "fingerprints", Path(tempfile.gettempdir()) / f"moesaic-{os.getuid()}"):
        if not place.is_absolute():  # there is no home
            continue
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = place.lstat()
            is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
            if is_ours and os.access(place, os.W_OK):
                return place
    return None
