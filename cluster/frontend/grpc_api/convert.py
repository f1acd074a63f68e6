"""Messages of `moesaic.v1` to and from our types. Pure: knows no server and no tokens.

Requests pass the same bounds as those over HTTP: the schemas are shared, only the names of fields are translated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet
from pydantic import Field, ValidationError

from cluster.errors import InvalidRequest
from cluster.frontend.generation.chat_messages import ConversationFields, Message
from cluster.frontend.generation.sequence import LogprobEntry, SamplingOptions, TextChunk, TokenText, Usage
from cluster.frontend.grpc_api.errors import FieldViolation, InvalidFields
from cluster.frontend.openai_api.sampling import SamplingFields
from cluster.frontend.openai_api.unsupported import echo
from cluster.rpc import generation_pb2 as pb

_MAX_UNKNOWN = 16
# Fields whose name in the shared schemas differs from the one in the messages.
_SAMPLING_NAMES = {"num_prompt_logprobs": "prompt_logprobs"}
_CHAT_NAMES = {"template_kwargs": "chat_template_kwargs"}

Generation = pb.GenerateRequest | pb.GenerateStreamRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation, checked, as chat templates take it."""

    messages: tuple[Mapping[str, object], ...]
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedGeneration:
    """One request: a prompt (text, token ids or a chat) and how to continue it.

    `ignored_fields` are paths, with numbers at their ends, of the first few fields that this server's messages lack.
    """

    prompt: str | Sequence[int] | ChatPrompt
    options: SamplingOptions
    ignored_fields: tuple[str, ...] = ()


class _Sampling(SamplingFields):
    num_logprobs: int | None = Field(None, ge=0)


class _Chat(ConversationFields):
    messages: list[Message] = Field(min_length=1)


def parse_generation(request: Generation) -> ParsedGeneration:
    """Check a request.

    Raises:
        InvalidRequest: names every field that is wrong, by its path in the message.
    """
    violations: list[FieldViolation] = []
    prompt: str | Sequence[int] | ChatPrompt | None = None
    options: SamplingOptions | None = None
    try:
        prompt = _prompt(request.prompt)
    except ValidationError as error:
        violations += _explained(error, "prompt.chat.", _CHAT_NAMES)
    try:
        options = _options(request.sampling)
    except ValidationError as error:
        violations += _explained(error, "sampling.", _SAMPLING_NAMES)
    if prompt is None or options is None:
        raise InvalidFields(violations)
    ignored = tuple(islice(_unknown(request), _MAX_UNKNOWN))
    return ParsedGeneration(prompt=prompt, options=options, ignored_fields=ignored)


def field_path(param: str) -> str:
    """Path in the request message of what an `InvalidRequest` of the front end names."""
    head = param.split(".")[0]
    if head in ("model", "prompt", "sampling"):
        return param
    names = {theirs: ours for ours, theirs in (*_SAMPLING_NAMES.items(), *_CHAT_NAMES.items())}
    message = "prompt.chat" if head in _Chat.model_fields else "sampling"
    return f"{message}.{names.get(param, param)}"


def stream_response(index: int, chunk: TextChunk) -> pb.GenerateStreamResponse:
    """One piece of choice `index`."""
    response = pb.GenerateStreamResponse(
        index=index,
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=map(_logprobs, chunk.logprobs or ()),
        prompt_logprobs=map(_logprobs, chunk.prompt_logprobs or ()),
        finish_reason=_finish_reason(chunk),
        usage=None if chunk.usage is None else _usage(chunk.usage),
    )
    _set_stop(response, chunk)
    return response


def whole_response(model: str, choices: Sequence[Sequence[TextChunk]]) -> pb.GenerateResponse:
    """All choices of a request, each from its chunks in order."""
    usages = [chunk.usage for chunks in choices for chunk in chunks if chunk.usage is not None]
    usage = pb.Usage(
        prompt_tokens=max((usage.prompt_tokens for usage in usages), default=0),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=min((usage.cached_tokens for usage in usages), default=0),
    )
    answers = [_choice(index, chunks) for index, chunks in enumerate(choices)]
    return pb.GenerateResponse(model=model, choices=answers, usage=usage)


def fill(message: ProtoMessage, value: object) -> None:
    """Copy a dataclass, or a mapping by name, into the message with the same field names; None stays absent.

    Enumerations go by name: `StartupPhase.READY` is STARTUP_PHASE_READY. What the message lacks is left out.
    """
    for name, item in _named_items(value):
        target = cast("FieldDescriptor | None", message.DESCRIPTOR.fields_by_name.get(name))
        if target is None or item is None:
            continue
        if isinstance(item, tuple):
            _fill_repeated(message, target, cast("tuple[object, ...]", item))
        elif target.message_type is not None:
            getattr(message, name).SetInParent()
            fill(getattr(message, name), item)
        else:
            setattr(message, name, _scalar(target, item))


def _named_items(value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((str(key), item) for key, item in cast("Mapping[object, object]", value).items())
    else:
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def _fill_repeated(message: ProtoMessage, target: FieldDescriptor, items: Sequence[object]) -> None:
    container = getattr(message, target.name)
    if target.message_type is None:
        container.extend(_scalar(target, item) for item in items)
        return
    for item in items:
        fill(container.add(), item)


def _scalar(target: FieldDescriptor, item: object) -> object:
    if target.enum_type is None:
        return item
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", target.enum_type.name).upper()
    known = target.enum_type.values_by_name.get(f"{prefix}_{cast('Enum', item).name}")
    return 0 if known is None else known.number


def _prompt(prompt: pb.Prompt) -> str | Sequence[int] | ChatPrompt:
    match prompt.WhichOneof("content"):
        case "text":
            return prompt.text
        case "token_ids":
            return tuple(prompt.token_ids.ids)
        case "chat":
            return _chat_prompt(prompt.chat)
        case None:
            message = "one of prompt.text, prompt.chat and prompt.token_ids must be set"
            raise InvalidRequest(message, param="prompt")


def _chat_prompt(chat: pb.Chat) -> ChatPrompt:
    fields = _set_fields(chat, _CHAT_NAMES)
    fields["messages"] = [{"content": message.content, **_set_fields(message)} for message in chat.messages]
    checked = _Chat.model_validate(fields)
    return ChatPrompt(
        messages=tuple(message.for_template() for message in checked.messages),
        add_generation_prompt=checked.opens_answer,
        continue_final_message=bool(checked.continue_final_message),
        template_kwargs=checked.chat_template_kwargs or {},
    )


def _options(sampling: pb.SamplingOptions) -> SamplingOptions:
    checked = _Sampling.model_validate(_set_fields(sampling, _SAMPLING_NAMES))
    return checked.sampling(
        max_tokens=checked.max_tokens,
        num_logprobs=checked.num_logprobs,
        num_prompt_logprobs=checked.prompt_logprobs,
    )


def _set_fields(message: ProtoMessage, names: Mapping[str, str] | None = None) -> dict[str, object]:
    """The fields that a client set, under their names in the shared schemas, as plain values."""
    names = names or {}
    return {names.get(field.name, field.name): _plain(field, value) for field, value in message.ListFields()}


def _plain(field: FieldDescriptor, value: Any) -> object:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {str(key): entry for key, entry in value.items()}  # JSON's keys are strings
    if field.is_repeated:
        return [json_format.MessageToDict(entry) if field.message_type else entry for entry in value]
    return json_format.MessageToDict(value) if field.message_type else value


def _unknown(message: ProtoMessage, prefix: str = "") -> Iterator[str]:
    for entry in UnknownFieldSet(message):
        yield f"{prefix}{entry.field_number}"
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if field.message_type.file.package.startswith("google."):
            continue  # values of the client's own choice
        for place, inner in enumerate(value if field.is_repeated else (value,)):
            yield from _unknown(
                inner, f"{prefix}{field.name}.{place}." if field.is_repeated else f"{prefix}{field.name}."
            )


def _explained(error: ValidationError, prefix: str, names: Mapping[str, str]) -> list[FieldViolation]:
    by_schema_name = {theirs: ours for ours, theirs in names.items()}
    violations: list[FieldViolation] = []
    for detail in error.errors(include_url=False, include_context=False):
        first, *rest = detail["loc"] or ("",)
        path = by_schema_name.get(str(first), str(first))
        path += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
        reason = detail["msg"].removeprefix("Value error, ")
        violations.append(FieldViolation(prefix + path, f"{reason} (got {echo(detail['input'])})"))
    return violations


def _choice(index: int, chunks: Sequence[TextChunk]) -> pb.Choice:
    choice = pb.Choice(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
        logprobs=[_logprobs(entry) for chunk in chunks for entry in chunk.logprobs or ()],
        prompt_logprobs=[_logprobs(entry) for chunk in chunks for entry in chunk.prompt_logprobs or ()],
        finish_reason=_finish_reason(chunks[-1]),
    )
    _set_stop(choice, chunks[-1])
    return choice


def _finish_reason(chunk: TextChunk) -> pb.FinishReason.ValueType:
    if chunk.finish_reason is None:
        return pb.FINISH_REASON_UNSPECIFIED
    return pb.FinishReason.Value(f"FINISH_REASON_{chunk.finish_reason.name}")


def _set_stop(message: pb.Choice | pb.GenerateStreamResponse, chunk: TextChunk) -> None:
    if isinstance(chunk.stop_reason, str):
        message.stop = chunk.stop_reason
    elif chunk.stop_reason is not None:
        message.stop_token_id = chunk.stop_reason


def _logprobs(entry: LogprobEntry) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(chosen=_token(entry.chosen), top=map(_token, entry.top), rank=entry.rank)


def _token(token: TokenText) -> pb.TokenLogprob:
    return pb.TokenLogprob(text=token.text, raw=token.raw, logprob=token.logprob, token_id=token.token_id)


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )
