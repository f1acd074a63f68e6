"""What Serve says of an application that does not start, read for the reason that is ours. Pure: text in, text out."""

from __future__ import annotations

import re

_OURS = re.compile(r"cluster\.errors\.\w+: (.+)$", re.MULTILINE)


def reason_of(message: str) -> str | None:
    """The last error of ours that a message of Serve's ends in, traceback and advice left out; None: it has none."""
    found = _OURS.findall(message)
    return found[-1].strip() if found else None


def first_line(error: BaseException) -> str:
    """Of a foreign error's message, which may be a page."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
