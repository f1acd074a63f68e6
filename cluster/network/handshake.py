"""How two processes prove to each other that they know a secret, without ever saying it.

The listener speaks first, with a nonce; who connects answers with a nonce and a proof, and the listener with a proof of
its own, before anything else is sent either way. A proof is an HMAC over both nonces, the speaker's role and what the
connection is for, so that one that was overheard is worth nothing on another connection, in the other direction, or at
another port that has the same secret. Knows bytes; knows no sockets.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Literal

NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size

Role = Literal["listener", "connector"]
Purpose = Literal["tokens", "shared memory", "grpc"]


def new_nonce() -> bytes:
    """Bytes [NONCE_BYTES] that nobody has used before."""
    return secrets.token_bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """One connection's, as both sides compute it."""

    purpose: Purpose
    listener_nonce: bytes
    connector_nonce: bytes

    def proof(self, secret: str, role: Role) -> bytes:
        """What the side `role` shows, bytes [PROOF_BYTES]."""
        message = b"\0".join((b"moesaic", self.purpose.encode(), role.encode()))
        nonces = self.listener_nonce + self.connector_nonce
        return hmac.digest(secret.encode(), message + b"\0" + nonces, "sha256")

    def is_proven(self, shown: bytes, secret: str, role: Role) -> bool:
        """Whether the side `role` knows the secret. False for nonces of another length: the two could be shifted."""
        are_whole = len(self.listener_nonce) == len(self.connector_nonce) == NONCE_BYTES
        return hmac.compare_digest(shown, self.proof(secret, role)) and are_whole
