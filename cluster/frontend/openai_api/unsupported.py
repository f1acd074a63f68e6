"""Parameters that are known and not implemented: which values are harmless, and how the others are refused."""

from __future__ import annotations

from typing import cast

from cluster.errors import InvalidRequest

MAX_ECHO_CHARS = 200

# Parameters of OpenAI, vLLM and SGLang that are not implemented, with the values that ask for nothing. Null, and
# strings, lists and objects that hold nothing, never ask for anything.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "adapter": (),
    "audio": (),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "custom_logit_processor": (),
    "detokenize": (True,),
    "documents": (),
    "ebnf": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_json_object": (False,),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "lora_path": (),
    "lora_request": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "reasoning_effort": ("none",),
    "regex": (),
    "response_format": ({"type": "text"},),
    "separate_reasoning": (True, False),
    "session_params": (),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": (),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
    "web_search_options": (),
}
# Parameters that change no answer: billing, storage and routing hints, and spaces that fast tokenizers never put.
_IGNORED = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "spaces_between_special_tokens",
        "store",
        "user",
        "verbosity",
    }
)


def asks_for_nothing(name: str, value: object) -> bool:
    """Whether a parameter that we lack can be left out. Unknown names are left to the schema.

    Raises:
        InvalidRequest: it asks for something that this server cannot do; names the parameter.
    """
    if name in _IGNORED:
        return True
    if name not in _NEUTRAL:
        return False
    if _holds_nothing(value) or any(_is_same(value, neutral) for neutral in _NEUTRAL[name]):
        return True
    raise InvalidRequest(f"{name} is not supported by this server (got {echo(value)})", param=name)


def known_parameters() -> dict[str, tuple[object, ...]]:
    """Every parameter that is known and not implemented, with its neutral values beside null and the empty ones.

    Those that change no answer have none: they take any value.
    """
    return {**_NEUTRAL, **dict.fromkeys(sorted(_IGNORED), ())}


def takes_any_value(name: str) -> bool:
    """Whether a known parameter changes no answer, whatever its value."""
    return name in _IGNORED


def echo(value: object) -> str:
    """What a client sent, cut to a size that an error message may have."""
    if isinstance(value, str):
        value = value[:MAX_ECHO_CHARS]
    elif isinstance(value, list):
        value = cast("list[object]", value)[:MAX_ECHO_CHARS]
    try:
        return repr(value)[:MAX_ECHO_CHARS]
    except RecursionError:
        return "a value that is nested too deeply to show"


def _is_same(value: object, neutral: object) -> bool:
    """Equal, and both truth values or neither: to Python 0 is false."""
    return value == neutral and isinstance(value, bool) is isinstance(neutral, bool)


def _holds_nothing(value: object) -> bool:
    if isinstance(value, dict):
        return all(entry is None for entry in cast("dict[str, object]", value).values())
    return value is None or (isinstance(value, str | list) and not value)
