"""Addresses as they are written: IPv6 in brackets, and where what listens everywhere is found. Pure."""

from __future__ import annotations

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def join_address(host: str, port: int | str) -> str:
    """`host:port`, the host in brackets where it has colons itself."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def listens_everywhere(host: str) -> bool:
    """Whether a server on `host` takes what comes to any of its machine's addresses."""
    return host in _EVERYWHERE


def local_host(host: str) -> str:
    """Where a client on the same machine finds what listens on `host`."""
    return _EVERYWHERE.get(host, host)
