"""Where experts lie: per-expert names of each family, fused tensors, and errors that name file and tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_builders import RULES, write_safetensors
from torch import Tensor

from actors.weights.expert_layout import ExpertLayout, conversion_rules, derive_layout, is_expert_key
from cluster.errors import CheckpointError
from cluster.model.safetensors_index import TensorRef, read_index
from cluster.types import ExpertId

HIDDEN, WIDTH, EXPERTS, LAYERS = 6, 4, 3, 2
MODULES = {f"model.layers.{layer}.mlp.experts": layer for layer in range(LAYERS)}
SHAPES = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}

NAMES = {
    "qwen3_moe": "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight",
    "olmoe": "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight",
    "mixtral": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight",
}
MIXTRAL_PARTS = {"gate": "w1", "down": "w2", "up": "w3"}


def _value(layer: int, expert: int, part: str) -> Tensor:
    start = 1000 * layer + 100 * expert + 30 * list(SHAPES).index(part)
    return torch.arange(start, start + HIDDEN * WIDTH, dtype=torch.float32).view(SHAPES[part])


def _published(family: str) -> dict[str, Tensor]:
    return {
        NAMES[family].format(layer=layer, expert=expert, part=part, w=MIXTRAL_PARTS[part]): _value(layer, expert, part)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for part in SHAPES
    }


def _fused() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, layer in MODULES.items():
        halves = [torch.cat([_value(layer, e, "gate"), _value(layer, e, "up")]) for e in range(EXPERTS)]
        tensors[f"{module}.gate_up_proj"] = torch.stack(halves)
        tensors[f"{module}.down_proj"] = torch.stack([_value(layer, e, "down") for e in range(EXPERTS)])
    return tensors


def _layout(directory: Path, tensors: dict[str, Tensor], family: str = "qwen3_moe") -> ExpertLayout:
    write_safetensors(directory / "model.safetensors", {"model.norm.weight": torch.ones(HIDDEN), **tensors})
    rules = conversion_rules(family)
    return derive_layout(read_index(directory), rules, MODULES, num_experts=EXPERTS, hidden=HIDDEN, intermediate=WIDTH)


def _read(ref: TensorRef) -> Tensor:
    raw = ref.file.read_bytes()[ref.offset : ref.offset + ref.num_bytes]
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(ref.shape)


def _check(layout: ExpertLayout) -> None:
    assert set(layout.experts) == {ExpertId(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)}
    for expert_id, tensors in layout.experts.items():
        for part, ref in zip(SHAPES, tensors.parts, strict=True):
            assert torch.equal(_read(ref), _value(expert_id.layer, expert_id.expert, part)), f"{part} of {expert_id}"
    assert layout.layers == (0, 1)
    assert layout.stored_bytes == LAYERS * EXPERTS * 3 * HIDDEN * WIDTH * 4
    assert layout.stored_dtype == "F32"


@pytest.mark.parametrize("family", sorted(NAMES))
def test_published_names_are_found(tmp_path: Path, family: str) -> None:
    _check(_layout(tmp_path, _published(family), family))


@pytest.mark.parametrize("family", sorted(NAMES))
def test_fused_tensors_are_sliced(tmp_path: Path, family: str) -> None:
    _check(_layout(tmp_path, _fused(), family))


def test_mixtral_gate_is_renamed_with_its_block() -> None:
    rules = conversion_rules("mixtral")

    assert rules.rename("model.layers.3.block_sparse_moe.gate.weight") == "model.layers.3.mlp.gate.weight"


def test_expert_ten_is_not_expert_one(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.0.mlp.experts.{e}.{part}_proj.weight": torch.full(shape, float(e))
        for e in range(12)
        for part, shape in SHAPES.items()
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)

    layout = derive_layout(
        read_index(tmp_path),
        RULES,
        {"model.layers.0.mlp.experts": 0},
        num_experts=12,
        hidden=HIDDEN,
        intermediate=WIDTH,
    )

    assert {int(_read(tensors.parts[0])[0, 0]) == e.expert for e, tensors in layout.experts.items()} == {True}


@pytest.mark.parametrize("part", list(SHAPES))
def test_missing_matrix_is_named(tmp_path: Path, part: str) -> None:
    tensors = _published("qwen3_moe")
    del tensors[f"model.layers.1.mlp.experts.2.{part}_proj.weight"]

    with pytest.raises(CheckpointError, match=rf"no {part} matrix for expert 2 of model.layers.1.mlp.experts") as error:
        _layout(tmp_path, tensors)

    assert str(tmp_path) in str(error.value)


def test_wrong_shape_names_file_tensor_and_both_shapes(tmp_path: Path) -> None:
    tensors = _published("mixtral")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors[name] = torch.zeros(WIDTH, HIDDEN)

    with pytest.raises(CheckpointError, match=r"model\.safetensors.*w2\.weight.*\(4, 6\).*\(6, 4\)"):
        _layout(tmp_path, tensors, "mixtral")


def test_fused_tensor_with_too_few_experts_names_the_first_missing(tmp_path: Path) -> None:
    tensors = _fused()
    tensors["model.layers.0.mlp.experts.down_proj"] = tensors["model.layers.0.mlp.experts.down_proj"][:2]

    with pytest.raises(CheckpointError, match=r"no down matrix for expert 2 of model\.layers\.0"):
        _layout(tmp_path, tensors)


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    tensors = _published("qwen3_moe")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)

    with pytest.raises(CheckpointError, match=r"stored as \['BF16', 'F32'\]"):
        _layout(tmp_path, tensors)


def test_expert_keys_are_told_from_their_neighbours() -> None:
    assert is_expert_key("model.layers.0.mlp.experts.gate_up_proj", MODULES)
    assert not is_expert_key("model.layers.0.mlp.experts_norm.weight", MODULES)
    assert not is_expert_key("model.layers.0.mlp.shared_experts.up_proj.weight", MODULES)
