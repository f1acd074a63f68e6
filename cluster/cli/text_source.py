"""Where text comes from: a server over HTTP or an engine in this process, the same thing to the commands."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cluster.cli.server_client import auth_headers, fetch_model_name, raise_for_answer, translated_http_errors
from cluster.errors import Unavailable

if TYPE_CHECKING:
    from cluster.config.load import MoesaicConfig
    from cluster.frontend.generation.sequence import SamplingOptions
    from cluster.frontend.generation.service import GenerationService


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Sampling flags; None leaves the choice to the server or engine."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None

    def given(self) -> dict[str, Any]:
        """Those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class TextPiece:
    """New text; the last piece has the finish reason."""

    text: str
    finish_reason: str | None = None


class TextSource(Protocol):
    """Streams completions and chat answers. Closing the iterator stops the generation."""

    @property
    def model(self) -> str:
        """Name of the model that answers."""
        ...

    def complete(self, prompt: str, options: TextOptions) -> AsyncGenerator[TextPiece]:
        """Continue plain text."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]], options: TextOptions) -> AsyncGenerator[TextPiece]:
        """Answer the last of `messages`."""
        ...


class ServerSource:
    """A server at `url`; `model` None takes the first that it serves."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = auth_headers(api_key)
        self._model = model or fetch_model_name(self._url, api_key=api_key)

    @property
    def model(self) -> str:
        """Name of the model that answers."""
        return self._model

    def complete(self, prompt: str, options: TextOptions) -> AsyncGenerator[TextPiece]:
        """Continue plain text."""
        return self._stream("/v1/completions", {"prompt": prompt, **options.given()})

    def chat(self, messages: Sequence[Mapping[str, str]], options: TextOptions) -> AsyncGenerator[TextPiece]:
        """Answer the last of `messages`."""
        return self._stream("/v1/chat/completions", {"messages": list(messages), **options.given()})

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[TextPiece]:
        import httpx

        from cluster.loadgen.sse import event_error_message, event_finish_reason, event_text, read_events

        body = {"model": self._model, "stream": True, **body}
        timeout = httpx.Timeout(600.0, connect=10.0)
        with translated_http_errors(self._url):
            async with (
                httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=timeout) as client,
                client.stream("POST", path, json=body) as response,
            ):
                await raise_for_answer(response)
                async for event in read_events(response.aiter_bytes()):
                    message = event_error_message(event)
                    if message is not None:
                        raise Unavailable(message)
                    yield TextPiece(event_text(event), event_finish_reason(event))


class LocalSource:
    """An engine in this process."""

    def __init__(self, config: MoesaicConfig) -> None:
        from cluster.app import local_service  # brings in torch
        from cluster.model.info import read_model_info

        self._model = read_model_info(config.model).name
        self._service: GenerationService = local_service(config)

    @property
    def model(self) -> str:
        """Name of the model that answers."""
        return self._model

    async def complete(self, prompt: str, options: TextOptions) -> AsyncGenerator[TextPiece]:
        """Continue plain text."""
        async with aclosing(self._generate(prompt, options)) as pieces:
            async for piece in pieces:
                yield piece

    async def chat(self, messages: Sequence[Mapping[str, str]], options: TextOptions) -> AsyncGenerator[TextPiece]:
        """Answer the last of `messages`."""
        prompt_ids = await self._service.encode_chat(messages)
        async with aclosing(self._generate(prompt_ids, options)) as pieces:
            async for piece in pieces:
                yield piece

    async def _generate(self, prompt: str | Sequence[int], options: TextOptions) -> AsyncGenerator[TextPiece]:
        from cluster.types import RequestId

        request_id = RequestId(f"cli-{uuid.uuid4().hex}")
        async with aclosing(self._service.generate(prompt, _sampling(options), request_id)) as chunks:
            async for chunk in chunks:
                yield TextPiece(chunk.text, str(chunk.finish_reason) if chunk.finish_reason else None)


def open_source(url: str | None, *, model: str | None, api_key: str | None, config: MoesaicConfig | None) -> TextSource:
    """The server at `url` if given, else an engine of our own with `config`."""
    if url is not None:
        return ServerSource(url, model=model, api_key=api_key)
    assert config is not None
    return LocalSource(config)


def _sampling(options: TextOptions) -> SamplingOptions:
    from cluster.frontend.generation.sequence import SamplingOptions

    return SamplingOptions(**options.given())
