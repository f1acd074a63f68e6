"""Strict validation of manifests against the API's own schemas, offline. See tests/data/kubernetes/README.md."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

FOLDER = Path(__file__).parent / "data" / "kubernetes"


def problems(manifest: dict[str, Any]) -> list[str]:
    """What the API server would refuse or silently drop, with its path; KeyError: no schema of that kind is here."""
    validator = _validator(manifest["apiVersion"], manifest["kind"])
    errors = sorted(validator.iter_errors(manifest), key=lambda error: error.json_path)
    return [f"{error.json_path}: {error.message}" for error in errors]


@cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    if (api_version, kind) == ("v1", "Pod"):
        group = _rayservice()["properties"]["spec"]["properties"]["rayClusterConfig"]["properties"]["headGroupSpec"]
        schema = {"properties": {"spec": group["properties"]["template"]["properties"]["spec"]}}
    else:
        schema = {("ray.io/v1", "RayService"): _rayservice, ("networking.k8s.io/v1", "Ingress"): _ingress}[
            api_version, kind
        ]()
    return jsonschema.Draft202012Validator(schema)


def _ingress() -> dict[str, Any]:
    return json.loads((FOLDER / "ingress.json").read_text())


@cache
def _rayservice() -> dict[str, Any]:
    schema = _strict(json.loads(gzip.decompress((FOLDER / "rayservice.json.gz").read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, not in a CRD
    return schema


def _strict(node: Any) -> Any:
    """Unknown fields are errors, as with kubectl's strict validation; quantities may be numbers."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    strict = {key: _strict(value) for key, value in node.items()}
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not open_ended:
        strict["additionalProperties"] = False
    return strict
