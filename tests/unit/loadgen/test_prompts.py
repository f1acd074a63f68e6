"""Prompts: bundled, from a file, and fitted to a length."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InvalidRequest
from cluster.loadgen.prompts import BUNDLED_PROMPTS, fit_prompt, fit_prompt_by_words, read_prompts, take_prompts


def test_bundled_prompts_are_many_and_distinct() -> None:
    assert len(set(BUNDLED_PROMPTS)) == len(BUNDLED_PROMPTS) == 24
    assert take_prompts(["a", "b"], 5) == ["a", "b", "a", "b", "a"]


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "eins", "domain": "x"}\n\n{"prompt": "zwei"}\n')
    assert read_prompts(path) == ("eins", "zwei")
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n', encoding="utf-8")
    assert read_prompts(path) == ("a\u2028b\x85c", "d")
    for text, message in (('{"prompt": 3}', "line 1"), ("{", "line 1"), ("", "empty"), ("[]", "line 1")):
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            read_prompts(path)


def test_sample_prompts_can_be_measured_with() -> None:
    sample = read_prompts(Path(__file__).parents[3] / "models" / "prompts.jsonl")
    assert len(set(sample)) == len(sample) >= 5


def test_fitting() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(ids: object) -> str:
        return "".join(chr(token) for token in ids)  # type: ignore[attr-defined]

    assert fit_prompt("abc", 2, encode=encode, decode=decode) == "ab"
    assert fit_prompt("abc", 7, encode=encode, decode=decode) == "abcabca"
    assert fit_prompt_by_words("one two three", 6, tokens_per_word=1.5) == "one two three one"
