"""A model holds what its checkpoint holds: nothing of it is computed instead, and nothing is passed over unsaid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from identity import Reference, assert_identical, engine_parts, generate_greedy, random_cases
from model_builders import FAMILIES, build_checkpoint
from other_families import NUM_EXPERTS, OTHER_FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.attention.status import worker_status
from actors.attention.worker import AttentionWorker
from actors.model.checkpoint import LoadedModel, load_model
from actors.model.file_check import check_against_file
from cluster.config.load import load_config
from cluster.errors import CheckpointError
from cluster.model.info import load_model_info
from cluster.model.safetensors_index import read_index
from cluster.stats.memory_store import MemoryStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

Change = Callable[[dict[str, Tensor]], object]  # what is done to the tensors of a file, in place

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def _rewrite(path: Path, change: Change) -> Path:
    """Change the tensors of a checkpoint of one file."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata={"format": "pt"})
    return path


def _tied(path: Path, family: str, change: Change) -> Path:
    return _rewrite(build_checkpoint(path, family, tie_word_embeddings=True), change)


def _own_head(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(7)
    tensors[HEAD] = 0.2 * torch.randn(tensors[EMBEDDINGS].shape, generator=generator)


def _same_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDINGS].clone()


def _head_only(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDINGS)


def _load(path: Path) -> LoadedModel:
    return load_model(load_model_info(str(path)), "float32")


@pytest.mark.parametrize("change", [_own_head, _same_head, _head_only])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_tied_embeddings_answer_as_transformers_whichever_of_the_two_is_stored(
    tmp_path: Path, family: str, change: Change
) -> None:
    path = _tied(tmp_path, family, change)
    prompts = random_cases(3, vocab_size=load_model_info(str(path)).vocab_size)
    with engine_parts(path, cache="40%") as parts:
        answers = generate_greedy(parts.engine, prompts, alone=False)

    assert_identical(Reference(path), prompts, answers)


def test_a_head_of_its_own_is_used_and_said_in_the_status(tmp_path: Path) -> None:
    path = _tied(tmp_path, "qwen3_moe", _own_head)

    loaded = _load(path)

    with safe_open(path / "model.safetensors", "pt") as tensors:
        assert torch.equal(loaded.model.lm_head.weight, tensors.get_tensor(HEAD))
        assert torch.equal(loaded.model.model.embed_tokens.weight, tensors.get_tensor(EMBEDDINGS))
    (problem,) = loaded.problems
    assert HEAD in problem
    assert EMBEDDINGS in problem
    config = load_config(None, {"model": {"path": str(path), "dtype": "float32"}})
    with engine_parts(path) as parts:
        worker = AttentionWorker(config, load_model_info(str(path)), MemoryStore())
        worker.parts = parts
        assert problem in worker_status(worker, config).degraded


@pytest.mark.parametrize("change", [_same_head, _head_only])
def test_embeddings_that_are_stored_once_or_alike_share_their_memory(tmp_path: Path, change: Change) -> None:
    loaded = _load(_tied(tmp_path, "qwen3_moe", change))

    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.problems == ()


def test_tied_embeddings_that_are_not_stored_at_all_are_missing(tmp_path: Path) -> None:
    path = _tied(tmp_path, "qwen3_moe", lambda tensors: tensors.pop(EMBEDDINGS))

    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing \(2 missing in all\)"):
        _load(path)


@pytest.mark.parametrize("family", sorted(FAMILIES | OTHER_FAMILIES))
def test_of_no_family_is_a_tensor_left_unused(tmp_path: Path, family: str) -> None:
    assert _load(build_checkpoint(tmp_path, family)).problems == ()


def test_tensors_that_no_part_of_the_model_uses_are_named(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
        tensors["model.layers.0.mlp.experts.0.down_proj.bias"] = torch.ones(64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # every model computes it
        tensors |= {f"model.layers.9.extra_{i}.weight": torch.ones(2) for i in range(4)}

    (problem,) = _load(_rewrite(build_checkpoint(tmp_path, "qwen3_moe"), add)).problems

    assert "model.layers.0.self_attn.q_proj.bias" in problem
    assert "model.layers.0.mlp.experts.0.down_proj.bias" in problem
    assert "and 3 more" in problem
    assert "inv_freq" not in problem


def test_layers_that_a_family_means_to_skip_are_not_reported(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.61.eh_proj.weight"] = torch.ones(2, 2)

    assert _load(_rewrite(build_checkpoint(tmp_path, "deepseek_v3"), add)).problems == ()


def test_a_weight_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.block_sparse_moe.gate.weight"].clone()

    path = _rewrite(build_checkpoint(tmp_path, "mixtral"), add)

    with pytest.raises(CheckpointError, match=r"block_sparse_moe\.gate\.weight and .* are both .*; one must go"):
        _load(path)


def test_buffers_that_are_stored_are_read(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    path = _rewrite(
        build_checkpoint(tmp_path, "deepseek_v3"), lambda tensors: tensors[name].copy_(torch.arange(NUM_EXPERTS) / 7)
    )

    gate = _load(path).model.get_submodule("model.layers.1.mlp.gate")

    assert torch.equal(gate.e_score_correction_bias, torch.arange(NUM_EXPERTS) / 7)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        (HEAD, lambda weight, model: weight.copy_(model.model.embed_tokens.weight)),
        ("model.layers.2.self_attn.k_proj.weight", lambda weight, _: weight.copy_(weight.flip(0))),
        ("model.norm.weight", lambda weight, _: weight[3].add_(1e-3)),
        ("model.layers.0.mlp.gate.weight", lambda weight, _: weight.fill_(torch.nan)),
    ],
)
def test_the_check_finds_weights_that_are_not_those_of_the_file(
    tmp_path: Path, name: str, spoil: Callable[[Tensor, torch.nn.Module], None]
) -> None:
    path = build_checkpoint(tmp_path, "qwen3_moe")
    model, index = _load(path).model, read_index(path)
    refs = {key: ref for key, ref in index.items() if ".experts." not in key}
    check_against_file(model, refs, index, None)

    spoil(model.get_parameter(name).data, model)

    with pytest.raises(CheckpointError, match=rf"of tensor {name} is .* in the file, but the model holds"):
        check_against_file(model, refs, index, None)
