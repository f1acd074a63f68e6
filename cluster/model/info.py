"""Where a model's files are and what its config.json says. Knows files and numbers, never tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from cluster.config.sections import ModelConfig
from cluster.errors import CheckpointError, ConfigError
from cluster.model.fingerprint import Mode, model_fingerprint
from cluster.model.generation_config import SamplingDefaults, read_eos_ids, read_object, read_sampling_defaults

_NO_DEFAULTS = SamplingDefaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts that the front end and the workers share about one model directory.

    `fingerprint` tells these weights, as they are held, from all others (cluster/model/fingerprint.py): processes with
    another one are of another model, whatever its name.
    """

    path: Path
    name: str
    model_type: str
    fingerprint: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    config: Mapping[str, Any]
    sampling: SamplingDefaults = _NO_DEFAULTS


def resolve_model(path: str, *, only_config: bool = False) -> Path:
    """The directory of MODEL: a local directory, an embedded model's name, or a hub id.

    Args: only_config: of a model on the hub, fetch config.json and nothing else.
    Raises:
        ConfigError: nothing of that name; says where it looked.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local.resolve()
    for root in _embedded_roots():
        if (root / path / "config.json").is_file():
            return (root / path).resolve()
    if path.startswith((".", "/", "~")) or "/" not in path:
        raise ConfigError(
            f"model {path!r}: no such directory, and no embedded model of that name; "
            "give a Hugging Face directory, a hub id (owner/name), or moesaic-demo"
        )
    import huggingface_hub  # heavy, and only for hub ids

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        hub = cast("Any", huggingface_hub)  # its signatures are only partly typed
        if only_config:
            return Path(hub.hf_hub_download(path, "config.json")).parent
        return Path(hub.snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated classes; all mean "not had"
        raise ConfigError(f"model {path!r}: not a local directory, and the hub did not give it: {error}") from error


def read_model_info(model: ModelConfig) -> ModelInfo:
    """What `load_model_info` says of a configured model."""
    return load_model_info(
        model.path,
        served_name=model.served_name,
        max_model_len=model.max_model_len,
        generation_config=model.generation_config,
        dtype=model.dtype,
        fingerprint=model.fingerprint,
    )


def load_model_info(
    path: str,
    *,
    served_name: str | None = None,
    max_model_len: int | None = None,
    generation_config: Literal["auto", "none"] = "none",
    dtype: str = "auto",
    fingerprint: Mode = "sampled",
) -> ModelInfo:
    """Read the small files of MODEL and check what can be checked cheaply.

    Args:
        generation_config: whether requests that say nothing of sampling get the author's; for front ends alone.
        dtype, fingerprint: as configured; they decide the fingerprint alone.
    """
    directory = resolve_model(path)
    config = _read_config(directory / "config.json")
    text_config = cast("dict[str, Any]", config.get("text_config", config))
    context, limited_by = _context(directory, text_config)
    if max_model_len is not None and max_model_len > context:
        raise ConfigError(
            f"config field model.max_model_len: {max_model_len} exceeds the model's context of {context}{limited_by}"
        )
    vocab_size = int(text_config.get("vocab_size", 0))
    return ModelInfo(
        path=directory,
        name=served_name or directory.name,
        model_type=str(text_config.get("model_type", "")),
        fingerprint=model_fingerprint(directory, config, dtype=dtype, mode=fingerprint),
        max_model_len=max_model_len or context,
        vocab_size=vocab_size,
        eos_token_ids=read_eos_ids(directory, config, vocab_size=vocab_size),
        config=config,
        sampling=read_sampling_defaults(directory) if generation_config == "auto" else SamplingDefaults(),
    )


def read_sizes(path: str, *, max_model_len: int | None = None) -> ModelInfo:
    """What config.json alone says of MODEL: no other file is read, none of weights is fetched.

    The fingerprint is empty: these facts are of no particular weights.

    Raises: as load_model_info.
    """
    directory = resolve_model(path, only_config=True)
    config = _read_config(directory / "config.json")
    text_config = cast("dict[str, Any]", config.get("text_config", config))
    context, limited_by = _context(directory, text_config)
    if max_model_len is not None and max_model_len > context:
        raise ConfigError(f"--max-model-len: {max_model_len} exceeds the model's context of {context}{limited_by}")
    return ModelInfo(
        path=directory,
        name=directory.name,
        model_type=str(text_config.get("model_type", "")),
        fingerprint="",
        max_model_len=max_model_len or context,
        vocab_size=int(text_config.get("vocab_size", 0)),
        eos_token_ids=(),
        config=config,
    )


def _context(directory: Path, text_config: Mapping[str, Any]) -> tuple[int, str]:
    """Tokens a sequence may have, and what limits them other than the model's own maximum.

    longrope takes other rotary frequencies for all tokens of a sequence once it outgrows the original context.
    Sequences of both kinds cannot share a step, nor can one keep its earlier keys; so no sequence may outgrow it.
    """
    context = text_config.get("max_position_embeddings")
    if not isinstance(context, int):
        raise CheckpointError(f"{directory / 'config.json'}: max_position_embeddings is missing")
    rope: object = text_config.get("rope_parameters") or text_config.get("rope_scaling")
    if not isinstance(rope, dict):
        return context, ""
    by_layer_type = cast("dict[str, Any]", rope)
    kinds = [by_layer_type, *(cast("dict[str, Any]", k) for k in by_layer_type.values() if isinstance(k, dict))]
    for kind in kinds:
        if kind.get("rope_type", kind.get("type")) not in ("longrope", "su"):
            continue
        original = kind.get("original_max_position_embeddings", text_config.get("original_max_position_embeddings"))
        if isinstance(original, int) and original < context:
            return original, f" (longrope is served up to its original context; the model itself goes to {context})"
    return context, ""


def _embedded_roots() -> tuple[Path, ...]:
    """Where embedded models are: beside the packages in a checkout, below share/ where a wheel was installed."""
    checkout = Path(__file__).resolve().parents[2] / "models"
    try:
        files = metadata.files("moesaic") or []
    except metadata.PackageNotFoundError:
        files = []
    installed = {
        Path(str(f.locate())).resolve().parent.parent for f in files if f.match("share/moesaic/models/*/config.json")
    }
    return (checkout, *sorted(installed))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing; a model directory needs config.json")
    return read_object(path)
