"""Where a client may put its API key, over HTTP and gRPC alike. Pure: knows header values; no transport."""

from __future__ import annotations

import hmac

_SCHEME = "bearer"  # its case is the client's choice, by RFC 9110


def presented_keys(authorization: str, x_api_key: str) -> tuple[str, ...]:
    """The keys in the values of `Authorization: Bearer KEY` and `X-Api-Key: KEY`; empty values hold none.

    Clients that must send the first fill it with anything, so both count.
    """
    scheme, _, token = authorization.strip().partition(" ")
    bearer = token.strip() if scheme.lower() == _SCHEME else ""
    return tuple(key for key in (bearer, x_api_key.strip()) if key)


def has_key(presented: tuple[str, ...], key: str) -> bool:
    """Whether `key` is among those; the time that a wrong one takes tells nothing about it."""
    return any(hmac.compare_digest(given.encode(errors="replace"), key.encode()) for given in presented)


def refusal(presented: tuple[str, ...], how: str) -> str:
    """Why a call was not let in; `how` says how a key is sent."""
    return "incorrect API key" if presented else f"no API key; send it as {how}"
