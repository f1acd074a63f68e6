"""What is wrong with a configuration, in words: each field by its path, the nearest name for an unknown one. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from cluster.config.renamed import renamed_key

_SECRETS = frozenset({"api_key", "operator_key", "url"})  # a password may be in them


def describe_problems(
    error: ValidationError, sections: Mapping[str, type[BaseModel]], section: str | None = None
) -> list[str]:
    """One line for each thing that is wrong.

    Args: section: the section that was validated alone; None: the whole tree was.
    """
    return [
        _describe(tuple(detail["loc"]) if section is None else (section, *detail["loc"]), detail, sections)
        for detail in error.errors()
    ]


def unknown_section(name: str, sections: Iterable[str]) -> str:
    """The line for a section that there is not."""
    names = list(sections)
    return f"config: unknown section {name!r}{_nearest(name, names)}; sections are {', '.join(names)}"


def unknown_in_environment(
    environment: Iterable[str], prefix: str, delimiter: str, sections: Iterable[str]
) -> list[str]:
    """Lines for variables that begin like settings and name no section: they would be passed over silently."""
    names = list(sections)
    problems: list[str] = []
    for variable in sorted(environment):
        if not variable.upper().startswith(prefix):
            continue
        name = variable[len(prefix) :].split(delimiter)[0].lower()
        if name not in names:
            problems.append(f"environment variable {variable}: {unknown_section(name, names)}")
    return problems


def _describe(path: tuple[int | str, ...], detail: Mapping[str, Any], sections: Mapping[str, type[BaseModel]]) -> str:
    name = str(path[-1]) if path else ""
    if detail["type"] == "extra_forbidden":
        if len(path) == 1:
            return unknown_section(name, sections)
        if (new := renamed_key(_dotted(path))) is not None:
            return f"config field {_dotted(path)}: it is called {new} now"
        fields = list(sections[str(path[0])].model_fields) if len(path) == 2 else []
        hint = _namesake(name, sections) or _nearest(name, fields, str(path[0])) or _elsewhere(name, sections)
        return f"config field {_dotted(path)}: there is no such field{hint}"
    got = "" if name in _SECRETS else f" (got {detail.get('input')!r:.80})"
    return f"config field {_dotted(path)}: {str(detail['msg']).removeprefix('Value error, ')}{got}"


def _dotted(path: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in path)


def _nearest(name: str, names: Iterable[str], section: str = "") -> str:
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(names), n=1)
    return f"; did you mean {section}{'.' if section else ''}{found[0]}?" if found else ""


def _namesake(name: str, sections: Mapping[str, type[BaseModel]]) -> str:
    """The very same name in another section."""
    section = next((section for section, model in sections.items() if name in model.model_fields), None)
    return f"; did you mean {section}.{name}?" if section else ""


def _elsewhere(name: str, sections: Mapping[str, type[BaseModel]]) -> str:
    """A name like it in another section."""
    paths = {field: f"{section}.{field}" for section, model in sections.items() for field in model.model_fields}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(paths), n=1)
    return f"; did you mean {paths[found[0]]}?" if found else ""
