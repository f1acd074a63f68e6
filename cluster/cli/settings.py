"""The flags that set fields of the configuration, each declared once with its key; commands name those they take.

Reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, slots=True)
class Setting:
    """A flag that sets a field of the configuration. key: SECTION.FIELD; empty: it names the file. option: typer's."""

    key: str
    kind: type
    option: Any


def _sets(key: str, kind: type, text: str, *names: str, **more: Any) -> Setting:
    """Args: text: the flag's help. names: if not those that follow from the flag's name. more: as typer.Option."""
    return Setting(key, kind, typer.Option(*names, help=text, **more))


SETTINGS = {
    "model": Setting(
        "model.path",
        str,
        typer.Argument(metavar="[MODEL]", help="Local Hugging Face directory, hub id, or moesaic-demo."),
    ),
    "host": _sets("frontend.host", str, "Address to listen on; default 127.0.0.1."),
    "port": _sets("frontend.port", int, "Port to listen on; default 8000."),
    "grpc_port": _sets("grpc.port", int, "Port for gRPC; default 50051."),
    "grpc": _sets("grpc.enabled", bool, "Answer gRPC too; default yes.", "--grpc/--no-grpc"),
    "config": _sets("", Path, "YAML configuration file."),
    "expert_cache": _sets(
        "experts.cache", str, "Memory for experts: 512MiB or 25%; default: what is free.", metavar="SIZE|PERCENT"
    ),
    "eviction": _sets(
        "experts.eviction",
        str,
        "What leaves a full memory first: lru, lfu, mrs, eam, fmoe, moesaic.",
        metavar="POLICY",
    ),
    "prediction": _sets(
        "experts.prediction",
        str,
        "What is fetched ahead: none, next-gate, whole-layer, eam, fmoe, moesaic; default moesaic.",
        metavar="POLICY",
    ),
    "ram_tier": _sets(
        "experts.ram_tier",
        str,
        "Slower memory between disk and --expert-cache; default none.",
        metavar="SIZE|PERCENT",
    ),
    "link_gb_per_s": _sets(
        "experts.link_gb_per_s", float, "Emulate a link of this rate from --ram-tier; default: none."
    ),
    "policy_state": _sets(
        "experts.policy_state",
        Path,
        "Start from what was learned there, and save it there at the end.",
        metavar="FILE",
    ),
    "kv_cache": _sets(
        "attention.kv_cache", str, "Memory for the KV cache: 2GiB; default: for one whole sequence.", metavar="SIZE"
    ),
    "max_model_len": _sets("model.max_model_len", int, "Longest sequence in tokens; default: the model's."),
    "dtype": _sets("model.dtype", str, "auto, bfloat16 or float32."),
    "generation_config": _sets(
        "model.generation_config",
        str,
        "Where a request says nothing: sample as the model's author did, or not.",
        metavar="auto|none",
    ),
    "fingerprint": _sets(
        "model.fingerprint", str, "How weights are told apart; full reads all bytes.", metavar="sampled|full"
    ),
    "api_key": _sets("frontend.api_key", str, "Clients must send it as a bearer token."),
    "operator_key": _sets("frontend.operator_key", str, "Operators must send it to see or change the server."),
    "max_queue": _sets("attention.max_queue", int, "Requests that may wait; more are answered 429."),
    "redis_url": _sets("redis.url", str, "redis://host:port/db; default: one of our own."),
    "ray_address": _sets("ray.address", str, "Ray cluster to join; default: a local one."),
    "threads": _sets("attention.threads", int, "Compute threads; 0: all cores but one."),
    "served_name": _sets("model.served_name", str, "Model name that clients use."),
    "attention_workers": _sets("attention.workers", int, "Attention workers; default 1.", min=1),
    "expert_hosts": _sets(
        "experts.hosts", int, "Processes that own experts; default 0: experts are in the worker.", min=0
    ),
    "host_cache": _sets(
        "experts.host_cache", str, "Memory of each expert host; default: its experts.", metavar="SIZE|PERCENT"
    ),
}
"""Every flag that sets a field of the configuration, in the order in which `--help` shows them."""

ENGINE = (
    "model",
    "config",
    "expert_cache",
    "eviction",
    "prediction",
    "ram_tier",
    "link_gb_per_s",
    "policy_state",
    "kv_cache",
    "max_model_len",
    "dtype",
    "generation_config",
    "threads",
)
"""Those of an engine in this process."""


def settings(*names: str) -> dict[str, Any]:
    """Annotations of these flags, as `in_place_of` takes them."""
    return {name: Annotated[SETTINGS[name].kind | None, SETTINGS[name].option] for name in names}


def overrides(said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the flags said, by section and field, as `load_config` takes it; what was not given stays out.

    >>> overrides({"expert_cache": "25%", "threads": None, "config": None})
    {'experts': {'cache': '25%'}}
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, value in said.items():
        section, _, field = SETTINGS[name].key.partition(".")
        if value is not None and section:
            # Other processes have other working directories.
            tree.setdefault(section, {})[field] = str(value.absolute()) if isinstance(value, Path) else value
    return tree
