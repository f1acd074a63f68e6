"""Numbers from other processes: what is NaN or infinite stands for nothing. Pure.

One such number in a sum of costs makes every comparison with it false, and so every choice by it arbitrary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

Value = TypeVar("Value")


def with_finite_numbers(value: Value) -> Value:
    """The value, with 0 in the place of every float in it that is not finite; the very same one if there is none.

    Looks into dataclasses, mappings and tuples.
    """
    return cast("Value", _finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else 0.0
    if isinstance(value, tuple):
        items = cast("tuple[Any, ...]", value)
        found = [_finite(item) for item in items]
        changed = any(new is not old for new, old in zip(found, items, strict=True))
        return type(items)(found) if changed else items
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        found_by_key = {key: _finite(item) for key, item in mapping.items()}
        return found_by_key if any(found_by_key[key] is not mapping[key] for key in mapping) else mapping
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changes = {name: new for name, old in fields.items() if (new := _finite(old)) is not old}
        return dataclasses.replace(cast("Any", value), **changes) if changes else value
    return value
