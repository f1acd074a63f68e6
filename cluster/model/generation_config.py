"""What a checkpoint says about generating: the tokens that end a sequence, and how its author samples.

Knows the files of a model directory; knows no requests. The ends are the union of what transformers and vLLM stop at:
the tokenizer's end-of-sequence token, and those of generation_config.json or, where that names none, of config.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from cluster.errors import CheckpointError

_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Sampling where a request says nothing; None where the author says nothing either.

    Fields are those of `SamplingParams`; `max_tokens` bounds answers of requests that set no limit.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None

    def given(self) -> dict[str, float | int]:
        """Those that are set."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """The author's sampling, from generation_config.json; nothing where there is no such file.

    Raises:
        CheckpointError: a value that no request could have; names the file, the field and the switch.
    """
    generation = read_object(directory / _FILE)
    values: dict[str, Any] = {}
    for name, (kind, is_allowed, bounds) in _SAMPLING.items():
        value: object = generation.get("max_new_tokens" if name == "max_tokens" else name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | kind) or not is_allowed(value):
            raise CheckpointError(
                f"{directory / _FILE}: {name} is {str(value)[:100]}, but must be {bounds}; mend the file, or leave the "
                "author's sampling out with model.generation_config: none (--generation-config none)"
            )
        values[name] = max(value, 0) if name == "top_k" else kind(value)
    return SamplingDefaults(**values)


def read_eos_ids(directory: Path, config: Mapping[str, Any], *, vocab_size: int) -> tuple[int, ...]:
    """Ids of the tokens that end a sequence, ascending; those the model cannot generate are left out.

    Args:
        config: config.json, of which `text_config` counts where the whole has none.
        vocab_size: rows of the model's head; 0 if unknown.
    Raises:
        CheckpointError: an end that is no token id; names the file.
    """
    generation = read_object(directory / _FILE)
    text_config = cast("dict[str, Any]", config.get("text_config") or {})
    sources = ((_FILE, generation), ("config.json", config), ("config.json", text_config))
    ids: set[int] = set()
    for file, source in sources:
        value: object = source.get("eos_token_id")
        if value is None:
            continue
        values: list[object] = cast("list[object]", value) if isinstance(value, list) else [value]
        if not all(type(entry) is int for entry in values):
            raise CheckpointError(
                f"{directory / file}: eos_token_id is {str(values)[:100]}, but must be a token id or a list of such"
            )
        ids.update(cast("list[int]", values))
        break
    own = _tokenizer_eos(directory)
    if own is not None:
        ids.add(own)
    return tuple(sorted(token_id for token_id in ids if 0 <= token_id < (vocab_size or math.inf)))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        CheckpointError: not a JSON object; names the file.
    """
    if not path.is_file():
        return {}
    try:
        loaded: object = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return cast("dict[str, Any]", loaded)


def _tokenizer_eos(directory: Path) -> int | None:
    """Id of the tokenizer's end-of-sequence token, if its files name one."""
    config = {
        **read_object(directory / "special_tokens_map.json"),
        **read_object(directory / "tokenizer_config.json"),
    }
    eos: object = config.get("eos_token")
    text: object = cast("dict[str, object]", eos).get("content") if isinstance(eos, dict) else eos
    if not isinstance(text, str):
        return None
    added = cast("dict[str, dict[str, object]]", config.get("added_tokens_decoder") or {})
    for token_id, token in added.items():
        if token.get("content") == text:
            return int(token_id)
    tokenizer = read_object(directory / "tokenizer.json")
    for token in cast("list[dict[str, Any]]", tokenizer.get("added_tokens") or []):
        if token.get("content") == text:
            return int(token["id"])
    model = cast("dict[str, Any]", tokenizer.get("model") or {})
    vocab: object = model.get("vocab") or read_object(directory / "vocab.json")
    if isinstance(vocab, dict):
        return cast("dict[str, int]", vocab).get(text)
    pieces = [entry[0] for entry in cast("list[list[Any]]", vocab)]  # a unigram model: pieces with their scores
    return pieces.index(text) if text in pieces else None


_Allowed = tuple[type[int] | type[float], Callable[[Any], bool], str]
# What a request may have too.
_SAMPLING: dict[str, _Allowed] = {
    "temperature": (float, lambda value: 0 <= value <= 2, "a number from 0 to 2"),
    "top_p": (float, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "top_k": (int, lambda value: value >= -1, "a whole number from -1"),
    "min_p": (float, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (float, lambda value: 0 < value < math.inf, "a number above 0"),
    "presence_penalty": (float, lambda value: -2 <= value <= 2, "a number from -2 to 2"),
    "frequency_penalty": (float, lambda value: -2 <= value <= 2, "a number from -2 to 2"),
    "max_tokens": (int, lambda value: value >= 1, "max_new_tokens of at least 1"),
}
