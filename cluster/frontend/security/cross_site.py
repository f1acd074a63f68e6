"""Whether a browser was led here by somebody else's page: what operator routes ask before they do anything.

A page may send a form anywhere, so a body must be JSON, for which browsers ask first; a page that asks says where it
comes from; and a name that was bent to this machine's address is no name of ours. Pure: header values in, a reason out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.config.load import MoesaicConfig
from cluster.frontend.security.api_keys import Keys

_PRIVATE_ENDINGS = (".local", ".internal", ".localhost", ".svc", ".test")  # nobody can buy such a name


@dataclass(frozen=True, slots=True)
class CrossSite:
    """What is allowed. has_keys: a name of another site does not matter where a key is asked for, which it has not."""

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    has_keys: bool = False

    def reason(self, headers: Mapping[str, str], *, changes: bool) -> str | None:
        """Why a request is refused; None if it is not. Args: headers: by lower-case names. changes: it has a body."""
        if changes and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return "the body must be JSON, with 'Content-Type: application/json'"
        host = _name_of(headers.get("host", ""))
        if not self._is_allowed(host):
            return f"{host[:100]!r} is not a name of this server; set frontend.allowed_hosts"
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and _authority(origin) != headers.get("host", "").lower():
            return f"a page of {origin[:100]!r} may not do this; set frontend.operator_origins"
        if origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "a page of another site may not do this; set frontend.operator_origins"
        return None

    def _is_allowed(self, host: str) -> bool:
        if self.hosts:
            return host in {name.lower() for name in self.hosts}
        return self.has_keys or _is_private(host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def exposure_notices(config: MoesaicConfig) -> tuple[str, ...]:
    """What an operator should know of who can reach the server; nothing where that needs a key or this machine."""
    frontend, grpc = config.frontend, config.grpc
    addresses = [frontend.host, *([grpc.host or frontend.host] if grpc.enabled else [])]
    reachable = [address for address in dict.fromkeys(addresses) if not is_loopback(address)]
    keys = Keys.of(frontend)
    if not reachable or keys.client is not None:
        return ()
    what = "use it as clients do" if keys.operator else "use it and change how it works"
    return (
        f"it listens on {' and '.join(reachable)} without a key: whoever reaches it can {what}; "
        "set frontend.api_key and frontend.operator_key, or listen on 127.0.0.1",
    )


def _authority(origin: str) -> str:
    """Host and port of an origin; empty for `null`."""
    return urlsplit(origin).netloc.lower()


def _name_of(authority: str) -> str:
    """The host without its port."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").lower()
    except ValueError:
        return ""


def _is_private(host: str) -> bool:
    """An address, or a name that only the own network gives: no page elsewhere is served under it."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(host) and ("." not in host or host.endswith(_PRIVATE_ENDINGS))
    return True
