"""Sends scheduled requests to an OpenAI-compatible server and times every token.

Knows HTTP, server-sent events and the clock; knows nothing of what the numbers should be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cluster.errors import MoesaicError
from cluster.loadgen.arrivals import Schedule
from cluster.loadgen.sse import event_error, event_text, read_events

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What one request says."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """What became of one request. Times count from its scheduled arrival (open loop) or its sending (closed).

    `gaps_s` are the times between events with text; a server may put several tokens into one event.
    `error` is None, an HTTP code as text, an error code of the server, or `timeout` / `connection`.
    """

    ttft_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    e2e_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    send_lag_s: float = 0.0
    error: str | None = None


class LoadClient:
    """One server and one model. Use as `async with`."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        ignore_eos: bool = True,
        temperature: float = 0.0,
    ) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._model = model
        self._timeout_s = timeout_s
        self._extra = {"ignore_eos": True} if ignore_eos else {}
        self._temperature = temperature

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def send(self, request: LoadRequest, *, scheduled_s: float | None = None) -> RequestTiming:
        """Stream one completion. Never raises for what the server or the network does."""
        import httpx

        sent_s = time.perf_counter()
        recorder = _Recorder(start_s=sent_s if scheduled_s is None else scheduled_s, sent_s=sent_s)
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._http.stream("POST", "/v1/completions", json=self._body(request)) as response:
                    if response.status_code != 200:
                        await response.aread()
                        return recorder.timing(error=str(response.status_code))
                    await self._record(response, recorder)
        except (TimeoutError, httpx.TimeoutException):
            return recorder.timing(error="timeout")
        except httpx.HTTPError:
            return recorder.timing(error="connection")
        except MoesaicError as error:
            return recorder.timing(error=error.code or "stream")
        return recorder.timing(error=recorder.error)

    async def _record(self, response: httpx.Response, recorder: _Recorder) -> None:
        async for event in read_events(response.aiter_bytes()):
            recorder.take(event, now_s=time.perf_counter())

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": self._temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }


async def run_load(
    client: LoadClient,
    schedule: Schedule,
    requests: Sequence[LoadRequest],
    *,
    on_done: Callable[[RequestTiming], None] | None = None,
) -> tuple[list[RequestTiming], float]:
    """Send `requests[i]` at `schedule.arrivals[i]`; timings in that order, and the wall time in seconds."""
    start_s = time.perf_counter()
    slots = asyncio.Semaphore(schedule.concurrency) if schedule.concurrency is not None else None

    async def send_one(index: int, request: LoadRequest) -> RequestTiming:
        if slots is not None:
            async with slots:
                timing = await client.send(request)
        else:
            scheduled_s = start_s + schedule.arrivals[index].arrival_s
            await asyncio.sleep(max(0.0, scheduled_s - time.perf_counter()))
            timing = await client.send(request, scheduled_s=scheduled_s)
        if on_done is not None:
            on_done(timing)
        return timing

    async with asyncio.TaskGroup() as group:
        pairs = zip(range(len(schedule.arrivals)), requests, strict=True)
        tasks = [group.create_task(send_one(index, request)) for index, request in pairs]
    return [task.result() for task in tasks], time.perf_counter() - start_s


class _Recorder:
    """Times of one stream, and what its usage and error events say."""

    def __init__(self, *, start_s: float, sent_s: float) -> None:
        self._start_s = start_s
        self._sent_s = sent_s
        self._text_s: list[float] = []
        self._usage: dict[str, int] = {}
        self.error: str | None = None

    def take(self, event: dict[str, Any], *, now_s: float) -> None:
        self.error = event_error(event) or self.error
        self._usage = event.get("usage") or self._usage
        if event_text(event):
            self._text_s.append(now_s)

    def timing(self, *, error: str | None) -> RequestTiming:
        times = self._text_s
        return RequestTiming(
            ttft_s=times[0] - self._start_s if times else None,
            gaps_s=tuple(later - earlier for earlier, later in pairwise(times)),
            e2e_s=time.perf_counter() - self._start_s,
            prompt_tokens=self._usage.get("prompt_tokens", 0),
            output_tokens=self._usage.get("completion_tokens", len(times)),
            send_lag_s=self._sent_s - self._start_s,
            error=error,
        )
