"""OpenAI parameters that are known and not implemented: which values are harmless, and how the others are refused."""

from __future__ import annotations

from typing import cast

from cluster.errors import InvalidRequest

MAX_ECHO_CHARS = 200

# Parameters of OpenAI (and of vLLM) that are not implemented, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1,),
    "modalities": ([], ["text"]),
    "prediction": (),
    "priority": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}
# Parameters that change no answer: billing, storage and routing hints, and spaces that fast tokenizers never put.
_IGNORED = frozenset(
    {
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
    """Whether a parameter that we lack can be left out. Unknown names are left to the schema to refuse.

    Raises:
        InvalidRequest: it asks for something that this server cannot do; names the parameter.
    """
    if name in _IGNORED:
        return True
    if name not in _NEUTRAL:
        return False
    if value is None or value in _NEUTRAL[name]:
        return True
    raise InvalidRequest(f"{name} is not supported by this server (got {echo(value)})", param=name)


def echo(value: object) -> str:
    """What a client sent, cut to a size that an error message may have."""
    if isinstance(value, str):
        value = value[:MAX_ECHO_CHARS]
    elif isinstance(value, list):
        value = cast("list[object]", value)[:MAX_ECHO_CHARS]
    return repr(value)[:MAX_ECHO_CHARS]
