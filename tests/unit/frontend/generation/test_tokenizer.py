from __future__ import annotations

import json
import shutil

import pytest

from cluster.errors import CheckpointError, InvalidRequest
from cluster.frontend.generation.chat_template import ChatTemplate
from cluster.frontend.generation.tokenizer import Tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was ist 2+2? \N{GRINNING FACE}"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "  and <|im_end|> 3+3?\n"},
]


@pytest.mark.slow  # imports transformers
def test_matches_transformers(tokenizer, info):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(info.path))
    text = tokenizer.apply_chat_template(CHAT)
    assert text == reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = reference.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(text, add_special_tokens=False) == list(ids)
    for prompt in ("Hello world", "", "naïve \N{GRINNING FACE}\n\n\tdef f(x):", "<|endoftext|>x"):
        assert tokenizer.encode(prompt) == reference.encode(prompt)
        assert tokenizer.decode(reference.encode(prompt)) == reference.decode(
            reference.encode(prompt), skip_special_tokens=True
        )


def test_token_bytes_concatenate_to_the_text(tokenizer):
    text = "naïve \N{GRINNING FACE} x\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_missing_tokenizer_names_directory_and_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in caught.value.message


def test_damaged_tokenizer_names_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_damaged_template_names_the_file(tmp_path, info):
    shutil.copy(info.path / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        Tokenizer.load(tmp_path)


def test_template_in_tokenizer_config(tmp_path, info):
    shutil.copy(info.path / "tokenizer.json", tmp_path)
    config = {"chat_template": "{{ bos_token }}{{ messages[0]['content'] }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi"


def test_no_template_is_the_clients_error(tmp_path, info):
    shutil.copy(info.path / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.apply_chat_template(CHAT)


def test_template_that_refuses():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, origin="x")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render(CHAT)


def test_template_features():
    source = (
        "{% generation %}{{ messages[0] | tojson }}{% endgeneration %}"
        "{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}{{ thinking }}"
    )
    message = {"role": "user", "content": "<é>"}
    rendered = ChatTemplate(source, {}, origin="x").render([message], kwargs={"thinking": "on"})
    assert rendered == '{"role": "user", "content": "<é>"}4on'


def test_template_kwargs_may_not_replace_the_messages():
    with pytest.raises(InvalidRequest, match="messages"):
        ChatTemplate("x", {}, origin="x").render(CHAT, kwargs={"messages": []})


@pytest.mark.slow  # imports transformers
def test_older_files_are_converted(tmp_path, tokenizer, info):
    model = json.loads((info.path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    converted = Tokenizer.load(tmp_path)
    assert converted.encode("Hello, world") == tokenizer.encode("Hello, world")
