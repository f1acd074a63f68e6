"""The conversation of a chat request: which messages are taken, and what chat templates get to see of them.

Knows JSON fields; knows no template and no tokens. Every refusal names the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Self, cast

import orjson
from pydantic import BeforeValidator, Field, model_validator

from cluster.errors import InvalidRequest
from cluster.frontend.openai_api.request_fields import ClientModel
from cluster.frontend.openai_api.sampling import KnownFields
from cluster.frontend.openai_api.unsupported import echo

_MAX_ROLE_CHARS = 64
_MAX_TOOLS = 256
TEXT_PARTS = ("text", "input_text", "output_text")
NEEDS_CONTENT = ("system", "developer", "user")


def _joined_text(content: object) -> object:
    """A list of text parts as one string; templates of text models know strings only."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in cast("list[object]", content):
        fields: dict[str, object] = cast("dict[str, object]", part) if isinstance(part, dict) else {}
        text = part if isinstance(part, str) else fields.get("text")
        if not isinstance(text, str) or (fields and fields.get("type") not in TEXT_PARTS):
            raise ValueError("content parts must be of type 'text' with a string 'text'; this model reads text only")
        texts.append(text)
    return "\n".join(texts)


class Message(ClientModel):
    """One chat message. What the openai client adds to an answer it sends back is accepted and not used.

    Roles beyond OpenAI's are for templates that know them.
    """

    role: str = Field(min_length=1, max_length=_MAX_ROLE_CHARS)
    content: Annotated[str | None, BeforeValidator(_joined_text)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role in NEEDS_CONTENT:
            raise ValueError("a message needs content")
        return self

    def for_template(self) -> dict[str, object]:
        """The fields that chat templates know. `developer` is the newer word for `system`.

        Raises:
            InvalidRequest: the arguments of a tool call are not a JSON object.
        """
        fields = {
            "name": self.name,
            "reasoning_content": self.reasoning_content,
            "tool_calls": [_with_parsed_arguments(call) for call in self.tool_calls or ()],
            "tool_call_id": self.tool_call_id,
        }
        present: dict[str, object] = {name: value for name, value in fields.items() if value}
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content or "", **present}


class ConversationFields(KnownFields):
    """What the prompt of a chat is made from; shared by the endpoints that make one."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=_MAX_TOOLS)
    tool_choice: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _continues_or_opens(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            message = (
                "continue_final_message goes on with the last message, add_generation_prompt opens another: not both"
            )
            raise InvalidRequest(message, param="continue_final_message")
        return self

    @model_validator(mode="after")
    def _calls_no_tools(self) -> Self:
        """Templates may tell of tools; answers that call them are not served."""
        choice = self.tool_choice or ("auto" if self.tools else "none")
        if choice not in ("none", "auto") or (self.tools and choice != "none"):
            name = "tools" if self.tool_choice in (None, "auto") else "tool_choice"
            message = f"{name} is not supported by this server (got {echo(getattr(self, name))})"
            raise InvalidRequest(f"{message}; tools with tool_choice 'none' are shown to the model", param=name)
        return self

    @property
    def opens_answer(self) -> bool:
        """Whether the template opens the assistant's turn: yes, unless it was told not to, or goes on with the last."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes arguments as JSON in a string; templates go through them as a mapping."""
    function: object = call.get("function")
    if not isinstance(function, dict):
        return call
    fields = cast("dict[str, Any]", function)
    arguments: object = fields.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments) if arguments.strip() else {}
        except orjson.JSONDecodeError as error:
            message = f"the arguments of a tool call must be a JSON object: {error} (got {echo(arguments)})"
            raise InvalidRequest(message, param="messages") from None
    if not isinstance(arguments, dict | None):
        message = f"the arguments of a tool call must be a JSON object (got {echo(arguments)})"
        raise InvalidRequest(message, param="messages")
    return {**call, "function": {**fields, "arguments": cast("dict[str, Any] | None", arguments) or {}}}
