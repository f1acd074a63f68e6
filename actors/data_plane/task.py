"""A dispatch frame that a host has taken in, until it is answered. Knows frames and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.data_plane.frames import Answer, DispatchFrame, RefusalFrame, RefusalReason


@dataclass(slots=True, eq=False)
class DispatchTask:
    """A frame and the way back to whoever sent it."""

    frame: DispatchFrame
    reply: Callable[[Answer], None]
    arrived_s: float = field(default_factory=time.monotonic)

    def refuse(self, reason: RefusalReason, epoch: int, message: str) -> None:
        """Answer that it is not computed, and why."""
        self.reply(RefusalFrame(sequence=self.frame.sequence, reason=reason, epoch=epoch, message=message))
