"""What the store keeps of each worker's and host's expert memory: the last report, for a minute, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from cluster.status.expert_memory import ExpertMemoryStatus

OWNER_TTL_S = 60.0
"""Who has not reported for so long is gone."""

MAX_OWNERS = 4096
"""Workers and hosts whose reports are kept, those that reported last."""

_STATUS = TypeAdapter(ExpertMemoryStatus)


def pack_owner(status: ExpertMemoryStatus) -> bytes:
    """As JSON."""
    return json.dumps(asdict(status)).encode()


def unpack_owner(packed: bytes) -> ExpertMemoryStatus | None:
    """Inverse of `pack_owner`; None for what another version of this program wrote."""
    try:
        return _STATUS.validate_json(packed)
    except ValidationError:
        return None
