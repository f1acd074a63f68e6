"""What config.json alone says of sizes is what a running engine has."""

from __future__ import annotations

from pathlib import Path

import pytest
from identity import engine_parts
from model_builders import DEMO, FAMILIES, build_checkpoint

from actors.convert.widen import widen_checkpoint
from actors.model.shape import read_shape
from cluster.model.info import read_sizes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

_PAGES = 2 * 4096  # where a part of an expert lies in its file may cost a page at either end


def _check(path: Path, dtype: str) -> None:
    shape = read_shape(read_sizes(str(path), max_model_len=384), dtype)
    with engine_parts(path, dtype=dtype, kv_cache=str(16 * 2**20)) as parts:
        model, blocks = parts.engine.runner.model, parts.engine.batcher.blocks
        dense = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters() if not p.is_meta}
        assert shape.dense_bytes == sum(dense.values())
        assert blocks.num_blocks + 1 == 16 * 2**20 // (16 * shape.token_bytes)  # one block is for padding
        assert parts.backend is not None
        held = parts.backend.store.slot_bytes
        assert held - _PAGES * len(parts.layout.form.part_names) <= shape.expert_bytes <= held
        assert shape.num_layers * shape.num_experts == len(parts.layout.experts)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_demo_model_is_as_large_as_its_config_says(dtype: str) -> None:
    _check(DEMO, dtype)


def test_a_widened_model_is_as_large_as_its_config_says(tmp_path: Path) -> None:
    widen_checkpoint(DEMO, tmp_path / "wide", factor=4)

    _check(tmp_path / "wide", "auto")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_as_large_as_its_config_says(tmp_path: Path, family: str) -> None:
    _check(build_checkpoint(tmp_path / family, family), "float32")
