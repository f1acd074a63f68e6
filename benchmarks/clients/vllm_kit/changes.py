"""What is changed in the text of vLLM's tests: names of models, lengths, fixtures. Each change must apply."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEMO = "moesaic-demo"

FILES = (
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/completion/test_token_in_token_out.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_enable_force_include_usage.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/chat_completion/test_root_path.py",
    "openai/models/test_models.py",
    "openai/test_chunked_prompt.py",
    "openai/test_openai_schema.py",
    "openai/test_return_token_ids.py",
    "openai/test_return_tokens_as_ids.py",
    "serve/instrumentator/test_basic.py",
    "serve/middleware/test_optional_middleware.py",
    "serve/tokenize/test_tokenization.py",
)

_NAMES = (
    "HuggingFaceH4/zephyr-7b-beta",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "intfloat/multilingual-e5-small",
    "openai-community/gpt2",
)


@dataclass(frozen=True, slots=True)
class Change:
    """`old` becomes `new` in `file`, everywhere. `why` is one of model, length, fixture."""

    file: str
    old: str
    new: str
    why: str


_CHAT = "openai/chat_completion/test_chat.py"
_COMPLETION = "openai/completion/test_completion.py"
_ECHO = "openai/chat_completion/test_chat_echo.py"
_ROOT = "openai/chat_completion/test_root_path.py"
_TOKEN_IDS = "openai/test_return_token_ids.py"
_SAYING = '"Here is a common saying about apple. An apple a day, keeps"'
_REPEAT = '"Repeat after me: I love cats \U0001f431"'  # what the demonstration model does when asked, whatever the seed

CHANGES: tuple[Change, ...] = (
    # Tokens that the demonstration model's tokenizer makes of the same text.
    Change(_COMPLETION, "usage.prompt_tokens == 5", "usage.prompt_tokens == 7", "length"),
    Change(_COMPLETION, "usage.total_tokens == 10", "usage.total_tokens == 12", "length"),
    Change(_CHAT, "prompt_tokens=37, total_tokens=42", "prompt_tokens=21, total_tokens=26", "length"),
    # Its vocabulary has 4,096 tokens, its context 2,048.
    Change(_COMPLETION, "5000", "3000", "length"),
    Change("openai/chat_completion/test_logprob_token_ids.py", "5000", "3000", "length"),
    Change(_ECHO, '"151936"', '"4096"', "length"),
    Change("openai/test_chunked_prompt.py", "* 400", "* 150", "length"),
    Change("serve/tokenize/test_tokenization.py", "== 8192", "== 2048", "length"),
    Change("serve/instrumentator/test_basic.py", "=10000", "=2000", "length"),
    Change("serve/instrumentator/test_basic.py", '"min_tokens": 10000', '"min_tokens": 2000', "length"),
    # Random requests ask for up to 128 answers, each as long as the context, within a minute on a GPU.
    Change("openai/test_openai_schema.py", '"2048"', '"64"', "length"),
    # What that model answers, its template and its end of text.
    Change(_CHAT, "prompt_logprobs[3]", "prompt_logprobs[4]", "model"),  # a place where it foresees the prompt
    Change(_ECHO, _SAYING, '" Once upon a time"', "model"),  # which it ends by itself
    Change(_ECHO, '"tell me a common saying"', '"Tell me a story"', "model"),
    Change(_ROOT, _SAYING, '" Once upon a time"', "model"),
    Change(_ROOT, '"tell me a common saying"', '"Tell me a story"', "model"),
    Change(_COMPLETION, "[0, 0, 0, 0, 0]", "[70, 70, 70, 70, 70]", "model"),  # its 0 is a special token: no text
    Change(_CHAT, '"what is 1+1? please provide the result without any other text."', _REPEAT, "model"),
    Change(_CHAT, 'content == "2"', 'content == " Cats \U0001f431"', "model"),
    Change(
        _TOKEN_IDS,
        '"<|im_start|>system\\nYou like to use emojis in your responses."',
        '"You like to use emojis in your responses."',
        "model",
    ),
    Change(
        _TOKEN_IDS,
        '"I love cats \U0001f431<|im_end|>\\n<|im_start|>assistant\\n"',
        '"I love cats \U0001f431\\nAnswer:"',
        "model",
    ),
    Change(_TOKEN_IDS, 'content + "<|im_end|>"', 'content + "<|endoftext|>"', "model"),
)


def changed(file: str, text: str) -> str:
    """The text of one test file with all its changes.

    Raises:
        ValueError: a change finds nothing to change: another version of vLLM.
    """
    for name in _NAMES:
        text = re.sub(rf'(["\']){re.escape(name)}\1', f'"{DEMO}"', text)
    for change in CHANGES:
        if change.file != file:
            continue
        if change.old not in text:
            raise ValueError(f"{file}: {change.old!r} is not there; the changes are for vllm 0.33")
        text = text.replace(change.old, change.new)
    return text
