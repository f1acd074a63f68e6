"""Flags that several commands share, and how they become configuration. Reads no files itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.cli.trace_loads import Rates
    from cluster.config.load import MoesaicConfig

Model = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Local Hugging Face directory, hub id, or moesaic-demo.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML configuration file.")]
ExpertCache = Annotated[
    str | None, typer.Option(metavar="SIZE|PERCENT", help="Memory for experts: 512MiB or 25%; default: what is free.")
]
KvCache = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory for the KV cache: 2GiB; default: for one whole sequence.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence in tokens; default: the model's.")]
GenerationConfig = Annotated[
    str | None,
    typer.Option(metavar="auto|none", help="Where a request says nothing: sample as the model's author did, or not."),
]
Dtype = Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads; 0: all cores but one.")]
Eviction = Annotated[
    str | None,
    typer.Option(metavar="POLICY", help="What leaves a full memory first: lru, lfu, mrs, eam, fmoe, moesaic."),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY",
        help="What is fetched ahead: none, next-gate, whole-layer, eam, fmoe, moesaic; default moesaic.",
    ),
]
RamTier = Annotated[
    str | None,
    typer.Option(metavar="SIZE|PERCENT", help="Slower memory between disk and --expert-cache; default none."),
]
LinkRate = Annotated[
    float | None, typer.Option("--link-gb-per-s", help="Emulate a link of this rate from --ram-tier; default: none.")
]
PolicyState = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Start from what was learned there, and save it there at the end.")
]
Url = Annotated[str | None, typer.Option(help="Use the server at this URL instead of this process.")]
ApiKey = Annotated[str | None, typer.Option(envvar="MOESAIC_API_KEY", help="Bearer token of the server.")]
OperatorKey = Annotated[
    str | None,
    typer.Option(envvar="MOESAIC_OPERATOR_KEY", help="Operator key of the server, where it has one; opens all."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Overrides = dict[str, dict[str, Any]]


def engine_overrides(
    *,
    model: str | None,
    expert_cache: str | None,
    kv_cache: str | None,
    max_model_len: int | None,
    dtype: str | None,
    generation_config: str | None = None,
    threads: int | None,
    eviction: str | None = None,
    prediction: str | None = None,
    ram_tier: str | None = None,
    link_gb_per_s: float | None = None,
    policy_state: Path | None = None,
) -> Overrides:
    """Flags of the engine, as `load_config` takes them; those not given stay out."""
    return given_only(
        {
            "model": {
                "path": model,
                "max_model_len": max_model_len,
                "dtype": dtype,
                "generation_config": generation_config,
            },
            "experts": {
                "cache": expert_cache,
                "eviction": eviction,
                "prediction": prediction,
                "ram_tier": ram_tier,
                "link_gb_per_s": link_gb_per_s,
                # Other processes have other working directories.
                "policy_state": None if policy_state is None else str(policy_state.absolute()),
            },
            "attention": {"kv_cache": kv_cache, "threads": threads},
        }
    )


def given_only(overrides: Overrides) -> Overrides:
    """Without the values that are None and the sections that are empty."""
    given = {
        section: {name: value for name, value in fields.items() if value is not None}
        for section, fields in overrides.items()
    }
    return {section: fields for section, fields in given.items() if fields}


def read_config(path: Path | None, overrides: Overrides, *, with_model: bool = True) -> MoesaicConfig:
    """File, environment and flags; checks that the model exists, unless the caller does (`with_model` False).

    Raises:
        ConfigError: names the field, file or model.
    """
    from cluster.config.load import load_config
    from cluster.model.info import read_model_info

    config = load_config(path, overrides)
    if with_model:
        read_model_info(config.model)
    return config


PlanTrace = Annotated[
    Path | None, typer.Option("--trace", metavar="FILE", help="A recorded trace, instead of a running server.")
]
PlanHosts = Annotated[int, typer.Option("--hosts", min=1, help="With --trace: equal expert hosts.")]
PlanTokens = Annotated[float, typer.Option("--tokens-per-s", min=0, help="With --trace: generated in all.")]
PlanRows = Annotated[float, typer.Option("--rows", min=1, help="With --trace: decode rows of a host's batch.")]
PlanPrefillRows = Annotated[float, typer.Option("--prefill-rows", min=1, help="With --trace: prefill rows of one.")]
PlanExpertMs = Annotated[float, typer.Option("--expert-ms", min=0, help="With --trace: time of a distinct expert.")]
PlanRowMs = Annotated[float, typer.Option("--row-ms", min=0, help="With --trace: time of one row of an expert.")]
PlanLink = Annotated[float, typer.Option("--link", min=0.001, help="With --trace: GB/s at which experts are carried.")]
PlanSpare = Annotated[
    str, typer.Option("--spare", metavar="PERCENT", help="With --trace: room of a host beyond its even share.")
]


def trace_rates(
    *,
    tokens_per_s: float,
    rows: float,
    prefill_rows: float,
    expert_ms: float,
    row_ms: float,
    link: float = 1.0,
    spare: str = "0",
    horizon_s: float = 600.0,
    max_moved: str | None = None,
) -> Rates:
    """Flags of `plan --trace` and `diagnose --trace` as values.

    Raises:
        InvalidRequest: names the flag.
    """
    from cluster.cli.trace_loads import Rates
    from cluster.config.sizes import parse_size
    from cluster.errors import InvalidRequest

    try:
        share = float(spare.removesuffix("%")) / (100 if spare.endswith("%") else 1)
        max_bytes = None if max_moved is None else parse_size(max_moved)
    except ValueError as error:
        raise InvalidRequest(f"--spare or --max-moved: {error}") from error
    if share < 0:
        raise InvalidRequest(f"--spare {spare}: at least 0")
    return Rates(
        tokens_per_s=tokens_per_s,
        rows=rows,
        prefill_rows=prefill_rows,
        expert_s=expert_ms / 1e3,
        row_s=row_ms / 1e3,
        bytes_per_s=link * 1e9,
        spare=share,
        horizon_s=horizon_s,
        max_bytes=max_bytes,
    )
