"""Check Ray's manifests with KubeRay's own schemas, as an API server does but more strictly.

A field that the schema does not know is an error here, while a server drops it silently.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent / "data" / "kuberay" / "schemas.json"


def problems(document: dict[str, Any]) -> list[str]:
    """Return how a RayCluster, RayJob or RayService violates its schema."""
    if document["apiVersion"] != "ray.io/v1":
        return [f"apiVersion: {document['apiVersion']} is not ray.io/v1"]
    errors = _validators()[document["kind"]].iter_errors(document)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@cache
def _validators() -> dict[str, Draft202012Validator]:
    content = json.loads(SCHEMAS.read_text())
    shared = {name: _json_schema(part) for name, part in content["$defs"].items()}
    return {
        kind: Draft202012Validator(_json_schema(schema) | {"$defs": shared})
        for kind, schema in content["kinds"].items()
    }


def _json_schema(part: dict[str, Any]) -> dict[str, Any]:
    """Turn a structural schema of Kubernetes into a JSON schema, with its extensions translated."""
    if "$ref" in part:
        return part
    result = dict(part)
    if part.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    for word in ("items", "additionalProperties"):
        if isinstance(part.get(word), dict):
            result[word] = _json_schema(part[word])
    if fields := part.get("properties"):
        result["properties"] = {name: _json_schema(field) for name, field in fields.items()}
        filled = {name for name, field in fields.items() if "default" in field}  # by the server, before it validates
        result["required"] = [name for name in part.get("required", []) if name not in filled]
        if not part.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    return result
