"""The configuration tree: one YAML file, environment `MOESAIC__SECTION__FIELD`, the same for Helm."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from cluster.config.problems import describe_problems, unknown_in_environment, unknown_section
from cluster.config.sections import (
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

KEY_FIELDS = ("api_key", "operator_key")  # of the section frontend
CLI_KEYS = ("MOESAIC_API_KEY", "MOESAIC_OPERATOR_KEY")  # of commands that talk to a server


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
        ConfigError: unreadable file, unknown keys or values out of range; names all such fields.
    """
    tree = {} if path is None else _read_tree(path)
    prefix, delimiter = str(MoesaicConfig.model_config.get("env_prefix")), "__"
    problems = unknown_in_environment(os.environ, prefix, delimiter, _SECTIONS)
    config: MoesaicConfig | None = None
    try:
        config = MoesaicConfig(**tree)
    except ValidationError as error:
        problems += describe_problems(error, _SECTIONS)
    if overrides:
        try:
            config = with_overrides(config or MoesaicConfig.model_construct(), overrides)
        except ConfigError as error:
            problems += error.problems
    if config is None or problems:
        raise ConfigError.of(list(dict.fromkeys(problems)))
    return config


def with_overrides(config: MoesaicConfig, overrides: dict[str, dict[str, Any]]) -> MoesaicConfig:
    """The same with other fields. Raises: ConfigError: names all that are wrong."""
    merged = to_tree(config)
    for section, fields in overrides.items():
        merged.setdefault(section, {}).update(fields)
    return from_tree(merged)


def with_absolute_paths(config: MoesaicConfig) -> MoesaicConfig:
    """The same files and directories for processes that run elsewhere on this machine."""
    fields = (
        ("model", "path"),
        ("experts", "policy_state"),
        *(("grpc", f"tls_{n}") for n in ("cert", "key", "client_ca")),
    )
    overrides: dict[str, dict[str, Any]] = {}
    for section, name in fields:
        value: str | None = getattr(getattr(config, section), name)
        if value is None or (section == "model" and not Path(value).expanduser().is_dir()):
            continue  # the name of an embedded model, or of one on a hub
        overrides.setdefault(section, {})[name] = str(Path(value).expanduser().absolute())
    return with_overrides(config, overrides) if overrides else config


def _read_tree(path: Path) -> dict[str, Any]:
    """The file's sections; one without anything in it is left out."""
    try:
        loaded = cast(object, yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"config file {path}: the top level must be a mapping of sections")
    sections = cast("dict[object, Any]", loaded or {})
    return {str(name): fields for name, fields in sections.items() if fields is not None or name not in _SECTIONS}


def to_tree(config: MoesaicConfig) -> dict[str, Any]:
    """Plain nested values, secrets revealed: for front ends, which check keys, and for nobody else."""
    tree = config.model_dump(mode="json")
    for name in KEY_FIELDS:
        key: SecretStr | None = getattr(config.frontend, name)
        tree["frontend"][name] = key.get_secret_value() if key else None
    return tree


def without_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree for processes that check nobody's key."""
    return {**tree, "frontend": {**tree["frontend"], **dict.fromkeys(KEY_FIELDS)}}


def without_store(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree for processes that need no store: its URL may have a password in it."""
    return {**tree, "redis": {**tree["redis"], "url": None}}


def take_secrets_from(environment: MutableMapping[str, str]) -> None:
    """Remove what is secret from an environment that children would inherit; it has been read."""
    prefix = str(MoesaicConfig.model_config.get("env_prefix"))
    secrets = {*(f"{prefix}FRONTEND__{name.upper()}" for name in KEY_FIELDS), f"{prefix}REDIS__URL", *CLI_KEYS}
    for name in [name for name in environment if name.upper() in secrets]:
        del environment[name]


def from_tree(tree: dict[str, Any]) -> MoesaicConfig:
    """Inverse of `to_tree`; the environment does not override it a second time."""
    problems = [unknown_section(name, _SECTIONS) for name in sorted(set(tree) - set(_SECTIONS))]
    sections: dict[str, Section] = {}
    for name, model in _SECTIONS.items():
        if name not in tree:
            continue
        try:
            sections[name] = model.model_validate(tree[name])
        except ValidationError as error:
            problems += describe_problems(error, _SECTIONS, name)
    if problems:
        raise ConfigError.of(problems)
    return MoesaicConfig.model_construct(None, **sections)


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
