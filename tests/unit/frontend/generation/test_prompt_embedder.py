"""Prompts get their embeddings from the checkpoint; without a table they go without, and it is said once."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeAttentionWorker

from cluster.config.sections import FrontendConfig
from cluster.frontend.generation.prompt_embedder import PromptEmbedder
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.model.info import ModelInfo
from cluster.observability.metrics import FrontendMetrics
from cluster.semantics.embedding import unit_vector
from cluster.types import RequestId

WAIT_S = 60.0


def _write(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """A safetensors file."""
    header: dict[str, object] = {}
    data = b""
    for name, values in tensors.items():
        packed = values.astype({"F32": "<f4", "I8": "i1"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": (len(data), len(data) + len(packed))}
        data += packed
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.fixture(scope="module")
def demo(info: ModelInfo) -> PromptEmbedder:
    embedder = PromptEmbedder(info.path, info.vocab_size)
    assert embedder.wait(WAIT_S)
    return embedder


def test_a_request_carries_what_its_prompt_means(
    demo: PromptEmbedder, tokenizer: Tokenizer, info: ModelInfo, metrics: FrontendMetrics
) -> None:
    service = GenerationService(FakeAttentionWorker(), tokenizer, info, FrontendConfig(), metrics, demo.embed)
    texts = (
        "def area(radius):\n    return 3.14 * radius ** 2",
        "import sys\n\nfor line in sys.stdin:\n    print(line)",
        "Sure! Here is a recipe for a warm soup with carrots and onions.",
    )
    requests = [
        service.prepare(tokenizer.encode(text), SamplingOptions(max_tokens=4), RequestId(str(i)))
        for i, text in enumerate(texts)
    ]
    code, other_code, recipe = (unit_vector(request.embedding) for request in requests)
    assert [len(request.embedding) for request in requests] == [64] * 3
    assert code @ other_code > code @ recipe


def test_without_an_embedder_requests_have_none(
    tokenizer: Tokenizer, info: ModelInfo, metrics: FrontendMetrics
) -> None:
    service = GenerationService(FakeAttentionWorker(), tokenizer, info, FrontendConfig(), metrics)
    assert service.prepare([5, 6], SamplingOptions(max_tokens=4), RequestId("r")).embedding == b""


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "transformer.wte.weight", "language_model.model.embed_tokens.weight"]
)
def test_the_table_is_found_by_the_names_that_families_give_it(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    others = {
        "lm_head.weight": rng.standard_normal((9, 4)),
        "vision.embed_tokens.weight.x": rng.standard_normal((9, 4)),
    }
    _write(tmp_path / "model.safetensors", {**others, name: rng.standard_normal((9, 4))})

    embedder = PromptEmbedder(tmp_path, 9)

    assert embedder.wait(WAIT_S)
    assert len(embedder.embed([1, 2])) == 4


def test_the_table_may_be_in_any_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    _write(tmp_path / "a.safetensors", {"lm_head.weight": rng.standard_normal((9, 4))})
    _write(tmp_path / "b.safetensors", {"model.embed_tokens.weight": rng.standard_normal((9, 4))})
    index = {"weight_map": {"lm_head.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    assert PromptEmbedder(tmp_path, 9).wait(WAIT_S)


@pytest.mark.parametrize("damage", ["no file", "no table", "another type", "too few rows", "not finite"])
def test_a_checkpoint_without_a_readable_table_costs_the_embeddings_and_is_named(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.ones((9, 4)) * (np.nan if damage == "not finite" else 1)
    name = "lm_head.weight" if damage == "no table" else "model.embed_tokens.weight"
    if damage != "no file":
        _write(tmp_path / "model.safetensors", {name: values}, "I8" if damage == "another type" else "F32")

    embedder = PromptEmbedder(tmp_path, 99 if damage == "too few rows" else 9)

    assert not embedder.wait(WAIT_S)
    assert embedder.embed([1, 2, 3]) == b""
    (record,) = [record for record in caplog.records if record.name == "cluster.frontend.generation.prompt_embedder"]
    assert record.levelname == "WARNING" and "embeddings" in record.getMessage()
