"""The configuration tree: one YAML file, environment `MOESAIC__SECTION__FIELD`, the same for Helm.

Knows names, types and bounds; unknown keys are errors. Sizes are bytes or strings like "512MiB";
an expert cache may also be a percentage of the model's routed-expert bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self, cast

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from cluster.errors import ConfigError

DEFAULT_MODEL = "moesaic-demo"
AUTO = "auto"

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:I?B)?\s*$", re.IGNORECASE)
_PERCENT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*$")


def parse_size(text: str | int) -> int:
    """Bytes from "512MiB", "0.5G" or a plain number; all units are powers of 1024.

    Raises:
        ValueError: not a size.
    """
    match = _SIZE.match(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with K, M, G or T (512MiB)")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def parse_cache_size(text: str | int, *, total_bytes: int) -> int:
    """Bytes from a size, or from a percentage of `total_bytes`."""
    match = _PERCENT.match(str(text))
    return int(total_bytes * float(match.group(1)) / 100) if match else parse_size(text)


def is_zero(setting: str) -> bool:
    """Whether a size or percentage is none at all."""
    return parse_cache_size(setting, total_bytes=10**6) == 0


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """Which model, and how it computes."""

    path: str = Field(
        default=DEFAULT_MODEL, description="local Hugging Face directory, hub id, or the embedded moesaic-demo"
    )
    served_name: str | None = Field(default=None, description="name clients use; default: the last part of path")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="auto: bfloat16 for bfloat16 checkpoints, else float32"
    )
    max_model_len: int | None = Field(
        default=None, ge=16, description="longest sequence in tokens; default: the model's"
    )


class AttentionConfig(_Section):
    """The attention worker: batching, KV cache, threads."""

    kv_cache: str = Field(default="256MiB", description="KV cache bytes per worker")
    block_size: int = Field(default=16, ge=1, le=256, description="tokens per KV block")
    max_batch_tokens: int = Field(default=512, ge=1, description="token rows in one step (prefill chunk bound)")
    max_running: int = Field(default=32, ge=1, description="sequences that decode together")
    workers: int = Field(default=1, ge=1, le=1024, description="attention workers (Serve replicas)")
    max_workers: int | None = Field(
        default=None, ge=1, le=1024, description="waiting prompts may start more workers, up to this many"
    )
    max_queue: int = Field(default=256, ge=0, description="requests that may wait; more are answered 429")
    co_batching: bool = Field(
        default=True, description="of waiting requests, those whose experts the running ones use too go first"
    )
    threads: int = Field(
        default=0, ge=0, description="compute threads per worker; 0: its share of all cores but one, at least one"
    )

    @field_validator("kv_cache")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value


class ExpertsConfig(_Section):
    """The expert memory of workers and expert hosts, and the way between them."""

    cache: str = Field(
        default=AUTO,
        description="a worker's budget: bytes, percent of the routed-expert bytes, or auto (all; with hosts none)",
    )
    eviction: Literal["lru", "lfu", "mrs", "eam", "fmoe", "moesaic"] = Field(
        default="moesaic", description="what leaves a full memory first"
    )
    prediction: Literal["none", "next-gate", "whole-layer", "eam", "fmoe", "moesaic"] = Field(
        default="moesaic", description="what is fetched ahead of need"
    )
    host_tier: str = Field(
        default="0", description="slower memory between disk and the budget of cache: bytes or percent; 0: none"
    )
    remote_tier: str = Field(
        default="0", description="experts that each other node keeps in Ray's object store: bytes or percent; 0: none"
    )
    link_gb_per_s: float = Field(
        default=0.0, ge=0, description="declared rate of the link from host_tier, emulated; 0: as fast as memory copies"
    )
    learned_state: str | None = Field(
        default=None, description="file to start from and to save to what eviction and prediction have learned"
    )
    load_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="an expert that takes longer to load fails the requests that need it"
    )
    hosts: int = Field(default=0, ge=0, le=1024, description="expert hosts: processes that own and compute experts")
    max_hosts: int | None = Field(
        default=None, ge=1, le=1024, description="load may start more hosts, up to this many; default: as many as hosts"
    )
    host_cache: str = Field(default=AUTO, description="a host's budget, as cache; auto: the experts that it owns")
    host_threads: int = Field(
        default=0, ge=0, description="compute threads per host; 0: its share of all cores, at least one"
    )
    host_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="a host that takes longer for a layer is taken for lost"
    )
    carrier: Literal["auto", "shared_memory", "grpc", "actor_call"] = Field(
        default="auto", description="how rows reach a host; auto: shared memory where there is any, else gRPC"
    )
    checksums: bool = Field(default=False, description="check the arrays of every frame, for suspected transports")
    io_threads: int = Field(default=3, ge=1, le=64, description="threads that read experts from disk")
    direct_io: Literal["auto", "never"] = Field(
        default="auto", description="never: buffered reads that drop the page cache"
    )

    @field_validator("cache", "host_cache", "host_tier", "remote_tier", mode="before")
    @classmethod
    def _is_cache_size(cls, value: object, info: ValidationInfo) -> str:
        if value != AUTO or info.field_name not in ("cache", "host_cache"):
            parse_cache_size(str(value), total_bytes=1)
        return str(value)


class RedisConfig(_Section):
    """Where activation statistics are aggregated."""

    url: str | None = Field(default=None, description="redis://[:password@]host:port/db; wins over the embedded server")
    embedded: bool = Field(default=True, description="start a Valkey of our own when no url is given")


class FrontendConfig(_Section):
    """HTTP front end."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_key: SecretStr | None = Field(default=None, description="clients must send it as a bearer token")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    request_timeout_s: float = Field(default=600.0, gt=0)
    drain_timeout_s: float = Field(default=30.0, ge=0)
    keep_alive_s: float = Field(default=15.0, gt=0, description="an SSE comment after this long without a token")


class GrpcConfig(_Section):
    """gRPC front end. API key, request timeout and drain timeout are those of `frontend`."""

    enabled: bool = True
    host: str | None = Field(default=None, description="address to listen on; default: that of frontend")
    port: int = Field(default=50051, ge=1, le=65535)
    max_message_bytes: int = Field(default=16 * 2**20, ge=1024, description="of one message, both ways")
    reflection: bool = Field(default=True, description="clients may ask which services there are")
    tls_cert: str | None = Field(default=None, description="PEM file with the certificate chain; default: plain text")
    tls_key: str | None = Field(default=None, description="PEM file with the private key of tls_cert")
    tls_client_ca: str | None = Field(
        default=None, description="PEM file; clients must have a certificate signed by one of these"
    )
    keepalive_s: float = Field(default=60.0, ge=1, description="a silent client is asked after this long")
    max_connection_age_s: float | None = Field(
        default=None, ge=1, description="clients reconnect after this long, so that a balancer can spread them"
    )

    @model_validator(mode="after")
    def _has_whole_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self


class SchedulerConfig(_Section):
    """The central scheduler: routing, placement, migration, scale."""

    routing: Literal["semantic", "random", "least-loaded", "prefix-affinity"] = Field(
        default="semantic", description="how an attention worker is chosen for a request"
    )
    clusters: int = Field(default=16, ge=1, le=256, description="kinds of prompt that are told apart")
    half_life_s: float = Field(default=1800.0, gt=0, description="after so long an activation counts half")
    report_interval_s: float = Field(default=1.0, gt=0, le=60, description="workers and hosts report this often")
    placement: Literal["auto", "fixed"] = Field(
        default="auto", description="auto: experts move between hosts when that pays; fixed: they stay"
    )
    placement_interval_s: float = Field(default=60.0, gt=0, description="a plan is made this often")
    moved_per_minute: str = Field(
        default="1GiB", description="bytes of experts that may move between hosts in a minute"
    )

    @field_validator("moved_per_minute")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value


class MetricsConfig(_Section):
    """What Prometheus sees."""

    per_expert: bool = Field(
        default=False, description="a series for every layer, expert and phase; thousands for a large model"
    )


class RayConfig(_Section):
    """Which Ray cluster to join."""

    address: str | None = Field(default=None, description="of a running cluster; default: a local Ray of our own")
    namespace: str = "moesaic"
    worker_resources: dict[str, float] = Field(
        default_factory=dict, description="Ray resources that an attention worker needs, to choose its nodes"
    )
    host_resources: dict[str, float] = Field(
        default_factory=dict, description="Ray resources that an expert host needs, to choose its nodes"
    )


class MoesaicConfig(BaseSettings):
    """Everything that can be set. Precedence: arguments, environment, file, defaults."""

    model_config = SettingsConfigDict(
        env_prefix="MOESAIC__", env_nested_delimiter="__", extra="forbid", frozen=True, protected_namespaces=()
    )

    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    experts: ExpertsConfig = ExpertsConfig()
    redis: RedisConfig = RedisConfig()
    frontend: FrontendConfig = FrontendConfig()
    grpc: GrpcConfig = GrpcConfig()
    metrics: MetricsConfig = MetricsConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    ray: RayConfig = RayConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (env_settings, init_settings)


def worker_threads(config: MoesaicConfig, num_cores: int) -> int:
    """Compute threads of an attention worker: as set, else its share of a machine of `num_cores`."""
    num_processes = config.attention.workers + config.experts.hosts
    return config.attention.threads or max(1, (num_cores - 1 if num_processes == 1 else num_cores) // num_processes)


def host_threads(config: MoesaicConfig, num_cores: int) -> int:
    """Compute threads of an expert host: as set, else its share of a machine of `num_cores`."""
    return config.experts.host_threads or max(1, num_cores // (config.attention.workers + config.experts.hosts))


def load_config(path: Path | None = None, overrides: dict[str, dict[str, Any]] | None = None) -> MoesaicConfig:
    """Merge a YAML file, the environment and `overrides` (command-line flags, which win).

    Raises:
        ConfigError: unreadable file, unknown key or value out of range; names the field.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = cast(object, yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"config file {path}: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"config file {path}: the top level must be a mapping of sections")
        tree = cast("dict[str, Any]", loaded or {})
    config = _validated(tree)
    if not overrides:
        return config
    merged = to_tree(config)
    for section, fields in overrides.items():
        merged.setdefault(section, {}).update(fields)
    return from_tree(merged)


def to_tree(config: MoesaicConfig) -> dict[str, Any]:
    """Plain nested values, secrets revealed: what travels to Ray Serve as application arguments."""
    tree = config.model_dump(mode="json")
    key = config.frontend.api_key
    tree["frontend"]["api_key"] = key.get_secret_value() if key else None
    return tree


def from_tree(tree: dict[str, Any]) -> MoesaicConfig:
    """Inverse of `to_tree`; the environment does not override it a second time."""
    unknown = sorted(set(tree) - set(_SECTIONS))
    if unknown:
        raise ConfigError(f"config: unknown section {unknown[0]!r}; sections are {', '.join(_SECTIONS)}")
    sections: dict[str, _Section] = {}
    for name, value in tree.items():
        try:
            sections[name] = _SECTIONS[name].model_validate(value)
        except ValidationError as error:
            raise ConfigError(_explain(error, section=name)) from error
    return MoesaicConfig.model_construct(None, **sections)


def _validated(tree: dict[str, Any]) -> MoesaicConfig:
    try:
        return MoesaicConfig(**tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: ValidationError, section: str | None = None) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in (section, *first["loc"]) if part is not None)
    return f"config field {field}: {first['msg']} (got {first.get('input')!r:.80})"


_SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "attention": AttentionConfig,
    "experts": ExpertsConfig,
    "redis": RedisConfig,
    "frontend": FrontendConfig,
    "grpc": GrpcConfig,
    "metrics": MetricsConfig,
    "scheduler": SchedulerConfig,
    "ray": RayConfig,
}
