"""Write the configuration tree into the chart's values.schema.json: `python helm/config_schema.py`.

Sections and fields are those of cluster/config/load.py, so that names cannot drift; those that the chart sets are left
out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config.load import MoesaicConfig

SCHEMA = Path(__file__).resolve().parent / "moesaic" / "values.schema.json"
SET_BY_CHART = {"ray": None, "frontend": ("host", "port", "api_key", "operator_key")}


def config_schema() -> dict[str, Any]:
    """JSON schema of the values' `config`, without references."""
    tree = MoesaicConfig.model_json_schema()
    sections = {name: tree["$defs"][value["$ref"].rpartition("/")[2]] for name, value in tree["properties"].items()}
    for name, fields in SET_BY_CHART.items():
        for field in fields or ():
            del sections[name]["properties"][field]
        if fields is None:
            del sections[name]
    return {
        "description": "The configuration tree of `moesaic serve --config`; cluster/config/load.py has every field.",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _without_titles(section) for name, section in sections.items()},
    }


def _without_titles(node: Any) -> Any:
    """Without what the names say already. A field may itself be called title: only strings are titles."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_titles(value) for key, value in node.items() if key != "title" or not isinstance(value, str)}


def main() -> None:
    schema = json.loads(SCHEMA.read_text())
    schema["properties"]["config"] = config_schema()
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    main()
