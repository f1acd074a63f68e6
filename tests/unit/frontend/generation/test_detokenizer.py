from __future__ import annotations

import itertools

import pytest
from byte_tokenizers import byte_fallback
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.frontend.generation.detokenizer import Detokenizer
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.model.info import resolve_model

TOKENIZER = Tokenizer.load(resolve_model("moesaic-demo"))
FALLBACK = byte_fallback()
FACE = [4 + byte for byte in "\N{GRINNING FACE}".encode()]
ANY_IDS = st.lists(st.one_of(st.integers(0, 4095), st.integers(3, 258)), max_size=40)
TEXT_IDS = st.text(max_size=30).map(TOKENIZER.encode)


def run(detokenizer, ids, cuts):
    """Push `ids` cut at `cuts`; the emitted texts, and the stop string."""
    texts = []
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for start, end in itertools.pairwise(edges):
        piece = detokenizer.push(ids[start:end])
        texts.append(piece.text)
        if piece.stop is not None:
            return texts, piece.stop
    piece = detokenizer.finish()
    return [*texts, piece.text], piece.stop


@settings(max_examples=80, deadline=None)
@given(ids=st.one_of(ANY_IDS, TEXT_IDS), cuts=st.lists(st.integers(0, 50), max_size=12))
def test_any_split_gives_the_one_shot_text(ids, cuts):
    texts, _ = run(Detokenizer(TOKENIZER.decode), ids, cuts)
    assert "".join(texts) == TOKENIZER.decode(ids)


@settings(max_examples=50, deadline=None)
@given(prompt=TEXT_IDS, ids=TEXT_IDS, cuts=st.lists(st.integers(0, 50), max_size=12))
def test_prompt_context_changes_nothing_for_byte_level_text(prompt, ids, cuts):
    texts, _ = run(Detokenizer(TOKENIZER.decode, prompt_ids=prompt), ids, cuts)
    assert "".join(texts) == TOKENIZER.decode(ids)


@settings(max_examples=80, deadline=None)
@given(
    text=st.text("abc é", max_size=25),
    stop=st.lists(st.text("abc é", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 50), max_size=12),
)
def test_never_beyond_a_stop_string(text, stop, cuts):
    ids = TOKENIZER.encode(text)
    texts, matched = run(Detokenizer(TOKENIZER.decode, stop=stop), ids, cuts)
    shown = "".join(texts)
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if ends:
        assert matched in stop
        assert text.startswith(shown)
        assert not any(s in shown for s in stop)
        one_by_one, _ = run(Detokenizer(TOKENIZER.decode, stop=stop), ids, range(len(ids)))
        assert shown == "".join(one_by_one)
    else:
        assert matched is None
        assert shown == text


def test_holds_back_parts_of_a_character_and_of_a_stop_string():
    ids = TOKENIZER.encode("\N{GRINNING FACE}")
    detokenizer = Detokenizer(TOKENIZER.decode)
    assert [detokenizer.push([i]).text for i in ids] == [""] * (len(ids) - 1) + ["\N{GRINNING FACE}"]
    pieces = {i: chr(i) for i in range(128)}
    detokenizer = Detokenizer(lambda ids: "".join(pieces[i] for i in ids), stop=["END"])
    shown = [detokenizer.push([ord(c)]).text for c in "xENyE"]
    assert shown == ["x", "", "", "ENy", ""]
    assert detokenizer.finish().text == "E"


def test_tokens_behind_the_stop_string_are_not_counted():
    detokenizer = Detokenizer(lambda ids: "".join(map(chr, ids)), stop=["END"])
    piece = detokenizer.push([ord(c) for c in "helloENDmore"])
    assert (piece.text, piece.num_tokens, piece.stop) == ("hello", 8, "END")


def test_stop_strings_wait_for_min_tokens():
    detokenizer = Detokenizer(lambda ids: "".join(map(chr, ids)), stop=["a"], min_tokens=2)
    piece = detokenizer.push([ord(c) for c in "aabab"])
    assert (piece.text, piece.stop) == ("aab", "a")


def test_stripped_first_space_of_sentencepiece_is_kept_within_a_text():
    words = {1: "▁Hello", 2: "▁world", 3: "!"}

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(decode, prompt_ids=[1])
    assert [detokenizer.push([i]).text for i in (2, 3, 2)] == [" world", "!", " world"]


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, FALLBACK.vocab_size - 1), st.sampled_from(FACE)), max_size=24),
    cuts=st.lists(st.integers(0, 50), max_size=8),
    prompt=st.lists(st.integers(4 + 0x80, 4 + 0xFF), max_size=3),
)
def test_byte_tokens_give_the_one_shot_text_however_they_are_cut_off(ids, cuts, prompt):
    texts, _ = run(Detokenizer(FALLBACK.decode), ids, cuts)
    assert "".join(texts) == FALLBACK.decode(ids)
    prompt = [*FALLBACK.encode("a"), *prompt]
    unfinished = FALLBACK.unfinished_bytes(prompt)
    texts, _ = run(Detokenizer(FALLBACK.decode, prompt_ids=prompt, continues_character=bool(unfinished)), ids, cuts)
    before = FALLBACK.decode(prompt)
    assert (before[:-1] if unfinished else before) + "".join(texts) == FALLBACK.decode([*prompt, *ids])


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("before", ["", "a", "\N{GRINNING FACE}"])
def test_a_character_cut_off_is_one_replacement(length, before):
    before_ids = FALLBACK.encode(before)[2:] if before != "a" else FALLBACK.encode(before)
    ids = [*before_ids, *FACE[:length]]
    texts, _ = run(Detokenizer(FALLBACK.decode), ids, range(len(ids)))
    assert "".join(texts) == FALLBACK.decode(ids) == f"{before}\N{REPLACEMENT CHARACTER}"


def test_whole_characters_of_a_broken_run_of_bytes_stay():
    broken = [*FACE, 4 + 0xE6, *FACE, 4 + 0x80, 4 + 0xE6, 4 + 0x97]
    face, broken_char = "\N{GRINNING FACE}", "\N{REPLACEMENT CHARACTER}"
    assert FALLBACK.decode(broken) == f"{face}{broken_char}{face}{broken_char}{broken_char}"


def test_endless_broken_bytes_come_out_and_stay_cheap():
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return FALLBACK.decode(ids)

    detokenizer = Detokenizer(decode)
    shown = "".join(detokenizer.push([4 + 0x80]).text for _ in range(2000))
    assert len(shown) > 1900
    assert shown + detokenizer.finish().text == "\N{REPLACEMENT CHARACTER}" * 2000
    assert decoded < 2000 * 80


def test_long_runs_of_special_tokens_stay_cheap():
    detokenizer = Detokenizer(TOKENIZER.decode, prompt_ids=TOKENIZER.encode("Hello"))
    for _ in range(3000):
        assert detokenizer.push([0]).text == ""
    assert detokenizer.push(TOKENIZER.encode(" x")).text == " x"
