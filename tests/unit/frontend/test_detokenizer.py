from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.frontend.detokenizer import Detokenizer
from cluster.frontend.tokenizer import Tokenizer
from cluster.model_info import resolve_model

TOKENIZER = Tokenizer.load(resolve_model("moesaic-demo"))
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


def test_long_runs_of_special_tokens_stay_cheap():
    detokenizer = Detokenizer(TOKENIZER.decode, prompt_ids=TOKENIZER.encode("Hello"))
    for _ in range(3000):
        assert detokenizer.push([0]).text == ""
    assert detokenizer.push(TOKENIZER.encode(" x")).text == " x"
