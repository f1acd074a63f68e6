"""Configuration keys and flags that had another name: refused with the new one, never taken. Pure."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED_KEYS: Mapping[str, str] = {
    "experts.host_tier": "experts.ram_tier",
    "experts.learned_state": "experts.policy_state",
    "scheduler.clusters": "scheduler.prompt_clusters",
}
_WITHOUT_FLAG = frozenset({"scheduler.clusters"})


def renamed_key(key: str) -> str | None:
    """The name that `section.field` has now, if it had another; hyphens are as underscores."""
    return RENAMED_KEYS.get(key.lower().replace("-", "_"))


def renamed_flag(flag: str) -> str | None:
    """The name that a command-line flag has now, if it had another.

    >>> renamed_flag("--host-tier")
    '--ram-tier'
    """
    return RENAMED_FLAGS.get(flag)


def _flag_of(key: str) -> str:
    return "--" + key.rpartition(".")[2].replace("_", "-")


RENAMED_FLAGS: Mapping[str, str] = {
    _flag_of(old): _flag_of(new) for old, new in RENAMED_KEYS.items() if old not in _WITHOUT_FLAG
}
