"""Text to token ids and back, as the checkpoint defines it. Knows tokenizer files; knows no requests.

`tokenizer.json` is read with the `tokenizers` library alone, because importing transformers takes seconds;
transformers is imported only for checkpoints that have older files.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers

from cluster.errors import CheckpointError, InvalidRequest
from cluster.frontend.generation.byte_runs import CharacterDecoder, byte_of_piece, mended_byte_runs
from cluster.frontend.generation.chat_template import ChatTemplate

_CHARACTER_TOKENS = 8  # a character has at most four bytes; tokens without text may be between them
_OLDER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model", "tekken.json")


class Tokenizer:
    """One checkpoint's tokenizer and chat template; immutable, so threads may share it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: ChatTemplate | None,
        *,
        origin: str,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        """`facts` are the settings of the checkpoint, for who asks for them."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = template
        self._origin = origin
        added = backend.get_added_tokens_decoder()
        self._added = {index: str(token.content) for index, token in added.items()}
        self._special = frozenset(index for index, token in added.items() if token.special)
        source = None if template is None else template.source
        self.facts = {"tokenizer_class": "PreTrainedTokenizerFast", **(facts or {}), "chat_template": source}
        decoder = _decoder_json(backend)
        self._byte_by_char = _byte_by_char() if "ByteLevel" in decoder else None
        self._has_byte_fallback = "ByteFallback" in decoder

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read the tokenizer of a model directory.

        Raises:
            CheckpointError: no tokenizer files, or one that does not parse; names the file.
        """
        file = directory / "tokenizer.json"
        facts = _read_json(directory / "tokenizer_config.json")
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:
                raise CheckpointError(f"{file}: not a valid tokenizer: {error}") from error
            return cls(backend, _load_template(directory), origin=str(directory), facts=facts)
        found = [name for name in _OLDER_FILES if (directory / name).is_file()]
        if not found:
            raise CheckpointError(
                f"{file}: file is missing; a model directory needs tokenizer.json (or one of {', '.join(_OLDER_FILES)})"
            )
        backend = _converted_backend(directory, found[0])
        return cls(backend, _load_template(directory), origin=str(directory), facts=facts)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._backend.get_vocab_size()

    @property
    def is_made_of_bytes(self) -> bool:
        """Whether a text's bytes are those of its tokens, joined; other tokenizers put spaces between words."""
        return self._byte_by_char is not None or self._has_byte_fallback

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered at all."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; text of a chat template already contains its special tokens."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; each stretch of bytes that cannot be a character becomes one U+FFFD.

        What comes before a character is never changed by what follows: more ids only ever add text, or complete the
        character that a last U+FFFD stands for.
        """
        text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if not self._has_byte_fallback or "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        # The library gives up on a whole run of byte tokens, whole characters in it included, and writes one U+FFFD for
        # each byte. So what cannot be decoded leaves the run before it sees it.
        special = self._special if skip_special_tokens else frozenset[int]()
        pieces = [self._backend.id_to_token(token_id) for token_id in ids if token_id not in special]
        known = mended_byte_runs([piece for piece in pieces if piece is not None])
        return self._backend.decoder.decode(known) if self._backend.decoder is not None else text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text for chat messages; encode it with `add_special_tokens=False`.

        Raises:
            InvalidRequest: the checkpoint has no chat template, or it refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest(
                f"the model in {self._origin} has no chat template; use /v1/completions", param="messages"
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            kwargs=kwargs,
        )

    def token_piece(self, token_id: int) -> str:
        """What the vocabulary writes for a token, with its stand-ins for spaces and bytes; empty for unknown ids."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; may be only a part of a character. Unknown ids stand for none."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_by_char is not None and all(char in self._byte_by_char for char in piece):
            return bytes(self._byte_by_char[char] for char in piece)
        if self._has_byte_fallback:
            byte = byte_of_piece(piece)
            if byte is not None:
                return bytes([byte])
            return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    def text_bytes(self, token_id: int, *, opens_text: bool, skip_special_tokens: bool) -> bytes:
        """What a token adds to a text; `opens_text`: at its very beginning, where decoders may strip a space."""
        if skip_special_tokens and token_id in self._special:
            return b""
        raw = self.token_bytes(token_id)
        if opens_text and raw.startswith(b" "):
            stripped = self._backend.decode([token_id], skip_special_tokens=False).encode()
            return stripped if raw.endswith(stripped) else raw
        return raw

    def special_text(self, token_id: int) -> str | None:
        """The text of a special token; None for others."""
        return self._added[token_id] if token_id in self._special else None

    def unfinished_bytes(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> bytes:
        """The bytes at the end of `ids` that are the beginning of a character; as a rule none."""
        if not self.is_made_of_bytes:
            return b""
        decoder = CharacterDecoder()
        for token_id in ids[-_CHARACTER_TOKENS:]:
            decoder.push(self.text_bytes(token_id, opens_text=False, skip_special_tokens=skip_special_tokens))
        return decoder.unfinished

    def places(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """The character at which each of `ids` was found when `text` was encoded; None if it gives other ids."""
        for add_special_tokens in (True, False):
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            if list(encoding.ids) == list(ids):
                starts = [start for start, _ in encoding.offsets]
                if add_special_tokens:  # what was added at the end is recorded as being at 0
                    starts = [
                        len(text) if start == 0 and max(starts[:index], default=0) > 0 else start
                        for index, start in enumerate(starts)
                    ]
                return starts
        return None


def _converted_backend(directory: Path, file: str) -> tokenizers.Tokenizer:
    """Let transformers convert older files; only its resulting backend is kept."""
    transformers = cast("Any", importlib.import_module("transformers"))  # heavy, and only for older checkpoints
    try:
        backend = transformers.AutoTokenizer.from_pretrained(str(directory)).backend_tokenizer
    except Exception as error:
        raise CheckpointError(f"{directory / file}: transformers could not convert this tokenizer: {error}") from error
    return cast("tokenizers.Tokenizer", backend)


def _load_template(directory: Path) -> ChatTemplate | None:
    config = _read_json(directory / "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_json(directory / "special_tokens_map.json"), **config})
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, origin=str(file))
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = _template_source(_read_json(directory / name).get("chat_template"))
        if source is not None:
            return ChatTemplate(source, special_tokens, origin=str(directory / name))
    return None


def _template_source(value: object) -> str | None:
    """A template is a string, or a list of named ones of which "default" serves chats."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        for entry in cast("list[dict[str, str]]", value):
            if entry.get("name") == "default":
                return entry.get("template")
    return None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name, value in config.items():
        if not name.endswith("_token"):
            continue
        content: object = cast("dict[str, object]", value).get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return cast("dict[str, Any]", loaded)


def _decoder_json(backend: tokenizers.Tokenizer) -> str:
    decoder = backend.decoder
    return "" if decoder is None else bytes(decoder.__getstate__()).decode()


def _byte_by_char() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level BPE. Source: GPT-2's bytes_to_unicode, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
