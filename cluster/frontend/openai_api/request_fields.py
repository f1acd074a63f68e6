"""What bodies have in common: no coercion, and what becomes of names that no schema knows. Knows pydantic; no field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from cluster.errors import InvalidRequest

_MAX_NAMES = 16
_MAX_NAME_CHARS = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9_.\-]")


class StrictModel(BaseModel):
    """No coercion (the string "5" is no number) and no unknown names."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


class ClientModel(StrictModel):
    """What programs of many authors send: null means left out, and unknown names are kept aside."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        given = cast("dict[str, object]", fields)
        return {name: value for name, value in given.items() if value is not None or not cls._is_optional(name)}

    @classmethod
    def _is_optional(cls, name: str) -> bool:
        return name in cls.model_fields and not cls.model_fields[name].is_required()

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema with null wherever a field may be left out."""
        whole = handler(schema)
        described = handler.resolve_ref_schema(whole)
        required = described.get("required", [])
        for name, field in described.get("properties", {}).items():
            if name not in required and not _takes_null(field):
                kept = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
                described["properties"][name] = {"anyOf": [field, {"type": "null"}], **kept}
        return whole


def unknown_fields(body: BaseModel) -> tuple[str, ...]:
    """Paths of the first few fields that a body has and its schema has not, fit for a header."""
    return tuple(map(_header_name, islice(_unknown(body), _MAX_NAMES)))


def refuse_unknown(body: BaseModel) -> None:
    """Return if the schema knows all fields of a body.

    Raises:
        InvalidRequest: it does not; names the first few.
    """
    names = unknown_fields(body)
    if names:
        raise InvalidRequest(f"Unrecognized request argument supplied: {', '.join(names)}", param=names[0])


def _unknown(body: BaseModel, prefix: str = "") -> Iterator[str]:
    yield from (prefix + name for name in body.model_extra or ())
    for name in type(body).model_fields:
        value: object = getattr(body, name)
        if isinstance(value, BaseModel):
            yield from _unknown(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for place, entry in enumerate(cast("list[object]", value)):
                if isinstance(entry, BaseModel):
                    yield from _unknown(entry, f"{prefix}{name}.{place}.")


def _header_name(name: str) -> str:
    return _UNSAFE.sub("?", name[:_MAX_NAME_CHARS])


def _takes_null(field: dict[str, Any]) -> bool:
    return not field.keys() - {"title", "default", "description"} or any(
        option.get("type") == "null" for option in (field, *field.get("anyOf", ()))
    )
