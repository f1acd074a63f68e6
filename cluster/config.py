"""The configuration tree: one YAML file, environment `MOESAIC__SECTION__FIELD`, the same for Helm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from cluster.config_sections import (
    AttentionConfig,
    ExpertsConfig,
    FrontendConfig,
    GrpcConfig,
    MetricsConfig,
    ModelConfig,
    RayConfig,
    RedisConfig,
    SchedulerConfig,
    Section,
)
from cluster.errors import ConfigError


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
    sections: dict[str, Section] = {}
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


_SECTIONS: dict[str, type[Section]] = {
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
