"""The steady load of a drill: greedy streams over HTTP and gRPC whose tokens are known, and a look at the door.

Knows addresses, protocols and the clock; knows nothing of faults.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc
import httpx

from cluster.loadgen.sse import event_error, read_events
from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub

_STREAM_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 1.0  # then a balancer, and this client, takes another front end
_PAUSE_S = 0.2


class DoorClosed(Exception):
    """Nobody listens there."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and the tokens that must follow."""

    prompt_ids: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Door:
    """One front end: `node` by `protocol`."""

    node: int
    protocol: str
    address: str


@dataclass(slots=True)
class Stream:
    """One request and what became of it. Times are the loop's."""

    door: Door
    case: Case
    started_s: float
    token_ids: list[int] = field(default_factory=list)
    event_s: list[float] = field(default_factory=list)
    taken_s: float | None = None  # the front end has answered: the request is accepted
    ended_s: float | None = None
    error: str | None = None

    @property
    def wrong_at(self) -> int | None:
        """Place of the first token that is not the expected one."""
        pairs = zip(self.token_ids, self.case.expected, strict=False)
        return next((i for i, (got, expected) in enumerate(pairs) if got != expected), None)

    def longest_stall_s(self, since_s: float) -> float:
        """The longest time without a token after `since_s`, up to the end."""
        times = [max(self.started_s, since_s), *(at for at in self.event_s if at > since_s)]
        if self.ended_s is not None and self.error is not None:
            times.append(max(self.ended_s, since_s))
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


class SteadyLoad:
    """`concurrency` streams at a time, round the doors, until stopped."""

    def __init__(self, model: str, doors: Sequence[Door], cases: Sequence[Case], *, concurrency: int) -> None:
        self.streams: list[Stream] = []
        self.num_refused = 0  # connections that no front end took
        self._model = model
        self._doors = itertools.cycle(doors)
        self._cases = itertools.cycle(cases)
        self._stopping = False
        self._tasks = [asyncio.create_task(self._run()) for _ in range(concurrency)]

    def under_way(self) -> list[Stream]:
        """Streams that a front end has taken and that are not over."""
        return [stream for stream in self.streams if stream.taken_s is not None and stream.ended_s is None]

    async def stop(self) -> None:
        """No more streams; waits for those under way."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _run(self) -> None:
        while not self._stopping:
            door, case = next(self._doors), next(self._cases)
            stream = Stream(door, case, _now_s())
            self.streams.append(stream)
            try:
                async with asyncio.timeout(_STREAM_TIMEOUT_S):
                    async for token_ids in generate(door, self._model, case, lambda s=stream: _take(s)):
                        stream.token_ids += token_ids
                        stream.event_s.append(_now_s())
                if len(stream.token_ids) != len(case.expected):
                    stream.error = f"ended after {len(stream.token_ids)} of {len(case.expected)} tokens"
            except DoorClosed:  # as a balancer does: the next one
                self.streams.remove(stream)
                self.num_refused += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the client saw
                stream.error = f"{type(error).__name__}: {error}"
            stream.ended_s = _now_s()


@dataclass(frozen=True, slots=True)
class Visit:
    """A new client: when it came, how long until some front end had served it; each it tried, and what came of it."""

    came_s: float
    took_s: float
    tries: tuple[str, ...]


class DoorWatch:
    """A new client every half second: how long it takes until some front end has served it."""

    def __init__(self, model: str, doors: Sequence[Door], case: Case) -> None:
        self.served: list[Visit] = []
        self._model = model
        self._case = Case(case.prompt_ids, case.expected[:1])
        self._doors = list(doors)
        self._waiting: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run())

    def longest_s(self, since_s: float, until_s: float = float("inf")) -> float:
        """The longest time to an answer of the clients that came from `since_s` to `until_s`; infinite without any."""
        return max((v.took_s for v in self.served if since_s <= v.came_s < until_s), default=float("inf"))

    async def stop(self) -> None:
        """No more clients; waits for those that are there."""
        self._task.cancel()
        await asyncio.gather(self._task, *self._waiting, return_exceptions=True)

    async def _run(self) -> None:
        for number in itertools.count():
            client = asyncio.create_task(self._come(number))
            self._waiting.add(client)
            client.add_done_callback(self._waiting.discard)
            await asyncio.sleep(0.5)

    async def _come(self, number: int) -> None:
        came_s = _now_s()
        tries: list[str] = []
        for place in itertools.count(number):
            door, tried_s = self._doors[place % len(self._doors)], _now_s()
            try:
                async for _ in generate(door, self._model, self._case, lambda: None):
                    pass
            except Exception as error:  # noqa: BLE001 - this door is closed
                tries.append(f"{door.protocol} of node {door.node} {_now_s() - tried_s:.1f} {type(error).__name__}")
                if _now_s() - came_s > _STREAM_TIMEOUT_S:
                    break
                continue
            tries.append(f"{door.protocol} of node {door.node} {_now_s() - tried_s:.1f}")
            break
        self.served.append(Visit(came_s, _now_s() - came_s, tuple(tries)))


def generate(door: Door, model: str, case: Case, on_taken: Callable[[], None]) -> AsyncIterator[list[int]]:
    """Tokens as they come. Args: on_taken: called when the front end has taken the request."""
    stream = _over_http if door.protocol == "http" else _over_grpc
    return stream(door.address, model, case, on_taken)


async def _over_http(url: str, model: str, case: Case, on_taken: Callable[[], None]) -> AsyncIterator[list[int]]:
    body = {
        "model": model,
        "prompt": list(case.prompt_ids),
        "max_tokens": len(case.expected),
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    timeout = httpx.Timeout(_STREAM_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    try:
        async with (
            httpx.AsyncClient(timeout=timeout, trust_env=False, verify=False) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {(await response.aread())[:200]!r}")
            on_taken()
            async for event in read_events(response.aiter_bytes()):
                if event_error(event):
                    raise RuntimeError(json.dumps(event))
                token_ids = (event.get("choices") or [{}])[0].get("token_ids")
                if token_ids:
                    yield token_ids
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise DoorClosed(url) from error


async def _over_grpc(address: str, model: str, case: Case, on_taken: Callable[[], None]) -> AsyncIterator[list[int]]:
    request = pb.GenerateStreamRequest(
        model=model,
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=case.prompt_ids)),
        sampling=pb.SamplingOptions(max_tokens=len(case.expected), temperature=0, ignore_eos=True),
    )
    await _knock(address)
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = GenerationServiceStub(channel).GenerateStream(request, timeout=_STREAM_TIMEOUT_S)
        on_taken()
        async for answer in call:
            if answer.token_ids:
                yield list(answer.token_ids)


async def _knock(address: str) -> None:
    """Return if somebody listens: gRPC itself would try for 20 s."""
    host, port = address.rsplit(":", 1)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError) as error:
        raise DoorClosed(address) from error
    writer.close()


def _take(stream: Stream) -> None:
    stream.taken_s = _now_s()


def _now_s() -> float:
    return time.monotonic()
