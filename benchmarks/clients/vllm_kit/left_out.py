"""Which of vLLM's tests are left out, by feature: refused by name in Moesaic, not served yet, or no server asked."""

from __future__ import annotations

import re

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "no server is asked: classes of vLLM itself": (
        r"test_chat\.py::test_chat_completion_request_",
        r"test_chat\.py::test_null_top_logprobs_is_same_as_omitted",
        r"test_completion\.py::test_completion_request_",
        r"test_logprob_token_ids\.py::test_(chat|completion)_request_decouples_",
        r"test_logprob_token_ids\.py::test_completion_rejects_explicit_token_ids_without_generated_tokens",
        r"test_logprob_token_ids\.py::test_requests_reject_explicit_token_ids_with_beam_search",
        r"test_openai_schema\.py::test_openapi_exposes_completion_response_schemas",
        r"test_return_tokens_as_ids\.py::test_responses_api_logprobs_with_return_tokens_as_token_ids",
        r"test_basic\.py::test_health_check_engine_dead_error",
    ),
    "LoRA adapters (refused by name)": (r"\[zephyr-lora", r"test_models\.py::test_check_models"),
    "structured outputs (refused by name until they are served)": (
        r"::test_structured_outputs_",
        r"::test_response_format_json_",
        r"::test_invalid_(json_schema|regex|grammar)",
        r"::test_empty_grammar",
    ),
    "tools (refused by name until they are served)": (
        r"test_return_token_ids\.py::test_chat_completion_with_tool_use",
        r"test_tokenization\.py::test_tokenize_chat_with_tools",
    ),
    "prompts as embeddings (refused by name)": (
        r"::test_load_prompt_embeds",
        r"::test_disable_prompt_embeds",
        r"test_prompt_validation\.py::test_empty_prompt",
    ),
    "beam search (refused by name)": (r"test_completion\.py::test_batch_completions",),
    "prefill and decode on different servers (refused by name)": (r"::test_kv_transfer_prompt_token_ids_",),
    "embeddings, Cohere's routes (not served yet)": (r"test_optional_middleware\.py::test_v2_endpoint_",),
}


def feature_of(test: str) -> str | None:
    """Why a test is left out; None: it runs."""
    for feature, patterns in LEFT_OUT.items():
        if any(re.search(pattern, test) for pattern in patterns):
            return feature
    return None
