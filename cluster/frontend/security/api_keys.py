"""Where a client may put its API key, over HTTP and gRPC alike. Pure: knows header values; no transport."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from enum import Enum

from cluster.config.sections import FrontendConfig
from cluster.errors import AuthenticationFailed, MoesaicError, PermissionDenied

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


class Level(Enum):
    """Who may use a route: a client, who is served; an operator, who sees how, and who changes it."""

    CLIENT = "client"
    OPERATOR_READS = "operator reads"
    OPERATOR_CHANGES = "operator changes"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that are set; the operator's opens everything.

    Without an operator's key, clients may also read the operator's pages; but where clients need a key, they are known
    to be many, and nobody may change anything. Without any key everybody may do everything.
    """

    client: str | None = field(default=None, repr=False)
    operator: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, config: FrontendConfig) -> Keys:
        """Those of a configuration."""
        client, operator = config.api_key, config.operator_key
        return cls(
            None if client is None else client.get_secret_value(),
            None if operator is None else operator.get_secret_value(),
        )

    @property
    def are_set(self) -> bool:
        """Whether there is any."""
        return self.client is not None or self.operator is not None

    def refusal(self, level: Level, presented: tuple[str, ...], how: str) -> MoesaicError | None:
        """Why a call is not let in; None if it is. Args: how: says how a key is sent."""
        if self.operator is not None and has_key(presented, self.operator):
            return None
        is_client = self.client is not None and has_key(presented, self.client)
        needed = self.client if level is Level.CLIENT else self.operator or self.client
        if needed is None or (needed == self.client and is_client and level is not Level.OPERATOR_CHANGES):
            return None
        if is_client:
            way_out = "send frontend.operator_key" if self.operator else "set frontend.operator_key, and send it"
            return PermissionDenied(f"this is for operators, not for clients; {way_out}", code="operator_key_needed")
        return AuthenticationFailed(refusal(presented, how), code="invalid_api_key")
