"""Log lines: one event per line, key=value. Knows formatting only; who logs what is decided at the call."""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

_FIELDS = "moesaic_fields"


class KeyValueFormatter(logging.Formatter):
    """`time=... level=... logger=... event="..." key=value`; values with spaces or quotes are JSON strings."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        fields.update(getattr(record, _FIELDS, {}))
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return " ".join(f"{name}={_text(value)}" for name, value in fields.items())


def configure_logging(level: str = "INFO", *, stream: TextIO | None = None) -> None:
    """Send this process's log to `stream` (default: standard error) as key=value lines.

    Raises:
        ValueError: `level` is not a level's name.
    """
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level.upper(), handlers=[output], force=True)


def log_event(
    logger: logging.Logger, level: int, event: str, *, error: BaseException | None = None, **fields: object
) -> None:
    """Log one event; `fields` become key=value pairs (`request_id` always, where there is one)."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={_FIELDS: fields}, exc_info=error)


def _text(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    is_plain = text != "" and text.isprintable() and not any(char in text for char in ' "=')
    return text if is_plain else json.dumps(text, ensure_ascii=False)
