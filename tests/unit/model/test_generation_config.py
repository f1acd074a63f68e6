"""What ends a sequence, and how the author samples, as the files of a model directory say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from cluster.errors import CheckpointError
from cluster.model.generation_config import SamplingDefaults
from cluster.model.info import ModelInfo, load_model_info

CONFIG = {"model_type": "mixtral", "vocab_size": 100, "max_position_embeddings": 512}
BPE = {"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 7}}, "added_tokens": [{"id": 9, "content": "<|end|>"}]}


def model(path: Path, **files: Any) -> str:
    for name, fields in {"config": CONFIG, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(fields))
    return str(path)


def info(path: Path, **files: Any) -> ModelInfo:
    return load_model_info(model(path, **files), generation_config="auto")


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"tokenizer_config": {"eos_token": "<|end|>"}, "tokenizer": BPE}, (9,)),
        ({"tokenizer_config": {"eos_token": {"content": "</s>"}}, "tokenizer": BPE}, (7,)),
        ({"special_tokens_map": {"eos_token": "</s>"}, "tokenizer": BPE}, (7,)),
        ({"tokenizer_config": {"eos_token": "</s>"}, "vocab": {"</s>": 3}}, (3,)),
        (
            {"tokenizer_config": {"eos_token": "</s>", "added_tokens_decoder": {"2": {"content": "</s>"}}}},
            (2,),
        ),
        (
            {
                "tokenizer_config": {"eos_token": "</s>"},
                "tokenizer": {"model": {"vocab": [["a", 0.0], ["</s>", -1.0]]}},
            },
            (1,),
        ),
        (
            {"config": CONFIG | {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<|end|>"}, "tokenizer": BPE},
            (5, 9),
        ),
        ({"config": CONFIG | {"eos_token_id": [5, 6]}, "generation_config": {"eos_token_id": 4}}, (4,)),
        ({"config": CONFIG | {"eos_token_id": [6, 5]}, "generation_config": {"eos_token_id": None}}, (5, 6)),
        (
            {
                "generation_config": {"eos_token_id": [4, 9, 3]},
                "tokenizer_config": {"eos_token": "</s>"},
                "tokenizer": BPE,
            },
            (3, 4, 7, 9),
        ),
        ({"config": {"text_config": CONFIG | {"eos_token_id": 8}}}, (8,)),
        ({"config": {"eos_token_id": 3, "text_config": CONFIG | {"eos_token_id": 8}}}, (3,)),
        ({"config": CONFIG | {"eos_token_id": [-1, 99, 100]}}, (99,)),
        ({"tokenizer_config": {"eos_token": None}, "tokenizer": BPE}, ()),
        ({"tokenizer_config": {"eos_token": "none of that name"}, "tokenizer": BPE}, ()),
        ({}, ()),
    ],
)
def test_ends_are_those_of_the_tokenizer_and_of_the_generation_config(tmp_path, files, ends):
    assert info(tmp_path, **files).eos_token_ids == ends


def test_the_end_of_a_tokenizer_is_what_the_library_calls_it(tmp_path):
    model(tmp_path, tokenizer_config={"eos_token": "<|end|>"})
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_model_info(str(tmp_path)).eos_token_ids == (backend.token_to_id("<|end|>"),)


def test_an_end_that_is_no_token_id_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is \['x'\]"):
        info(tmp_path, generation_config={"eos_token_id": ["x"]})


def test_the_authors_sampling_is_read_where_the_switch_says_so(tmp_path):
    chosen = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    path = model(tmp_path, generation_config=chosen | {"max_new_tokens": 64, "do_sample": True, "bos_token_id": 1})
    assert load_model_info(path, generation_config="auto").sampling == SamplingDefaults(max_tokens=64, **chosen)
    assert load_model_info(path, generation_config="none").sampling == SamplingDefaults()


def test_no_sampling_is_no_default(tmp_path):
    assert info(tmp_path, generation_config={"temperature": None, "top_k": -1}).sampling == SamplingDefaults(top_k=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 3), ("temperature", "1"), ("top_p", 0), ("top_k", 2.5), ("min_p", -1), ("max_new_tokens", 0)],
)
def test_sampling_that_no_request_could_have_is_named_with_the_way_out(tmp_path, field, value):
    path = model(tmp_path, generation_config={field: value})
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*generation_config: none"):
        load_model_info(path, generation_config="auto")
    assert load_model_info(path, generation_config="none").sampling == SamplingDefaults()
