"""What config.json says of a model's context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError, ConfigError
from cluster.model.info import load_model_info

LONGROPE = {"type": "longrope", "original_max_position_embeddings": 4096, "short_factor": [1.0], "long_factor": [2.0]}


def _model(path: Path, **fields: Any) -> str:
    config = {"model_type": "phimoe", "vocab_size": 100, "max_position_embeddings": 131072} | fields
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LONGROPE},
        {"rope_parameters": LONGROPE | {"rope_type": "longrope"}},
        {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}},
        {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096},
    ],
    ids=["rope_scaling", "rope_parameters", "by-layer-type", "beside"],
)
def test_longrope_is_bounded_by_its_original_context(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = _model(tmp_path, **fields)

    assert load_model_info(path).max_model_len == 4096
    assert load_model_info(path, max_model_len=4000).max_model_len == 4000
    with pytest.raises(ConfigError, match=r"8192 exceeds the model's context of 4096 \(longrope .* 131072\)"):
        load_model_info(path, max_model_len=8192)


@pytest.mark.parametrize("rope", [None, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}])
def test_other_rotary_embeddings_reach_the_models_context(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    path = _model(tmp_path, rope_scaling=rope)

    assert load_model_info(path).max_model_len == 131072
    with pytest.raises(ConfigError, match=r"200000 exceeds the model's context of 131072$"):
        load_model_info(path, max_model_len=200_000)


def test_missing_context_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_position_embeddings is missing"):
        load_model_info(_model(tmp_path, max_position_embeddings=None))
