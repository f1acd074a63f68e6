"""Sizes as people write them: bytes, "512MiB", or a percentage of a whole. Pure."""

from __future__ import annotations

import re

AUTO = "auto"

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?\s*$", re.IGNORECASE)
_PERCENT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*$")


def parse_size(text: str | int) -> int:
    """Bytes from "512MiB", "0.5G" or a plain number; all units are powers of 1024.

    Raises:
        ValueError: not a size.
    """
    match = _SIZE.match(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with K, M, G or T (512MiB)")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def parse_cache_size(text: str | int, *, total_bytes: int) -> int:
    """Bytes from a size, or from a percentage of `total_bytes`.

    Raises:
        ValueError: not a size, or more than all.
    """
    match = _PERCENT.match(str(text))
    if match is None:
        return parse_size(text)
    percent = float(match.group(1))
    if percent > 100:
        raise ValueError(f"{text} is more than there is: 100% is the most")
    return int(total_bytes * percent / 100)


def check_cache_size(text: str | int) -> None:
    """Whether a setting is a size, or a share of a whole.

    Raises:
        ValueError: it is neither, or more than the whole.
    """
    parse_cache_size(text, total_bytes=1)
    share = _PERCENT.match(str(text))
    if share is not None and float(share.group(1)) > 100:
        raise ValueError(f"{text!r} is more than all experts; at most 100%")


def is_zero(setting: str) -> bool:
    """Whether a size or percentage is none at all."""
    return parse_cache_size(setting, total_bytes=10**6) == 0
