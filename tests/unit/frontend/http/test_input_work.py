"""What clients' input costs before a worker is asked: bounded, and beside the event loop."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
import zlib

import pytest
from fakes import AsgiCall, FakeAttentionWorker

from cluster.config.sections import FrontendConfig
from cluster.errors import InvalidRequest, Overloaded
from cluster.frontend.generation.chat_template import ChatTemplate
from cluster.frontend.generation.input_pool import SMALL_BYTES, InputPool
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.generation.template_sandbox import BoundedSandbox, TemplateTooCostly
from cluster.frontend.http.app import create_app

DEADLINE_S = 10
LONG = "word " * SMALL_BYTES
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


class _WaitingTokenizer:
    """A tokenizer whose every long call lasts until the event loop has turned on meanwhile."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.turned = threading.Event()
        self.num_waits = 0

    def __getattr__(self, name):
        found = getattr(self._tokenizer, name)
        if name not in ("encode", "decode", "token_piece", "apply_chat_template"):
            return found

        def waiting(first, *args, **kwargs):
            if name == "apply_chat_template" or (not isinstance(first, int) and len(first) > 1000):
                self.turned.clear()
                self.num_waits += 1
                assert self.turned.wait(DEADLINE_S), f"{name} held the event loop"
            return found(first, *args, **kwargs)

        return waiting


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG, "truncate_prompt_tokens": 5, "max_tokens": 1}),
        ("/v1/chat/completions", CHAT),
        ("/tokenize", {"prompt": LONG}),
        ("/tokenize", {"messages": CHAT["messages"]}),
        ("/detokenize", {"tokens": [300] * SMALL_BYTES}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "bad_words": ["b" * 1024] * 200}),
    ],
)
def test_the_event_loop_turns_while_input_is_read(tokenizer, info, metrics, call, path, body):
    waiting = _WaitingTokenizer(tokenizer)
    worker = FakeAttentionWorker()
    service = GenerationService(worker, waiting, info, FrontendConfig(), metrics)
    app = create_app(service, worker, info, FrontendConfig(), metrics)

    async def heart():
        while True:
            waiting.turned.set()
            await asyncio.sleep(0.001)

    async def scenario():
        beat = asyncio.create_task(heart())
        try:
            return await call(app, "POST", path, json=body)
        finally:
            beat.cancel()

    response = asyncio.run(scenario())
    assert response.status_code == 200, response.text
    assert waiting.num_waits >= 1


def test_large_bodies_are_parsed_beside_the_event_loop(make_app, call, monkeypatch):
    from cluster.frontend.http import body as http_body

    threads = []
    parse = http_body.parse_body

    def noting(*args, **kwargs):
        threads.append(threading.current_thread() is threading.main_thread())
        return parse(*args, **kwargs)

    monkeypatch.setattr(http_body, "parse_body", noting)

    async def scenario():
        app = make_app()
        for body in (CHAT, CHAT | {"user": "x" * SMALL_BYTES}):
            await call(app, "POST", "/v1/chat/completions", json=body)
        compressed = gzip.compress(json.dumps(CHAT).encode())
        await call(app, "POST", "/v1/chat/completions", content=compressed, headers={"Content-Encoding": "gzip"})

    asyncio.run(scenario())
    assert threads == [True, False, False]


def test_a_full_pool_refuses_and_counts_what_still_runs():
    refusals = []
    pool = InputPool(threads=1, max_waiting=1, on_refusal=lambda: refusals.append(1))
    release, running = threading.Event(), threading.Event()

    def work():
        running.set()
        return release.wait(DEADLINE_S)

    async def scenario():
        async with asyncio.timeout(DEADLINE_S):
            first = asyncio.create_task(pool.run(work))
            while not running.is_set():
                await asyncio.sleep(0)
            left = asyncio.create_task(pool.run(work))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as raised:
                await pool.run(work)
            assert await pool.run(lambda: "small", num_bytes=SMALL_BYTES) == "small"
            left.cancel()  # who waits in the queue and leaves makes room at once
            await asyncio.gather(left, return_exceptions=True)
            second = asyncio.create_task(pool.run(work))
            first.cancel()  # who is being read and leaves makes none
            await asyncio.gather(first, return_exceptions=True)
            with pytest.raises(Overloaded):
                await pool.run(work)
            release.set()
            assert await second
            assert await pool.run(work)
        return raised.value

    assert "frontend.max_input_queue" in asyncio.run(scenario()).message
    assert len(refusals) == 2


def test_a_full_pool_is_429_with_retry_after(make_service, info, metrics, call):
    release = threading.Event()

    async def scenario():
        async with asyncio.timeout(DEADLINE_S):
            worker, config = FakeAttentionWorker(), FrontendConfig(input_threads=1, max_input_queue=0)
            service = make_service(worker, input_threads=1, max_input_queue=0)
            app = create_app(service, worker, info, config, metrics)
            busy = asyncio.create_task(service.inputs.run(lambda: release.wait(DEADLINE_S)))
            await asyncio.sleep(0)
            answers = [
                await call(app, "POST", path, json=body)
                for path, body in (
                    ("/v1/chat/completions", CHAT),
                    ("/v1/completions", {"prompt": LONG}),
                    ("/tokenize", {"prompt": LONG}),
                    ("/detokenize", {"tokens": [300] * SMALL_BYTES}),
                )
            ]
            release.set()
            await busy
            return answers

    for answer in asyncio.run(scenario()):
        assert answer.status_code == 429, answer.text
        assert int(answer.headers["retry-after"]) >= 1


def _nested(depth, inner="1"):
    return "[" * depth + inner + "]" * depth


@pytest.mark.parametrize("depth", [101, 900, 1023, 1100, 500_000])
@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": %s}}',
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": %s}}]}]}',
        '{"messages": [{"role": "user", "content": %s}]}',
        '{"messages": %s}',
        '{"messages": [{"role": "user", "content": "a"}], "tools": %s}',
        '{"messages": [{"role": "user", "content": "a"}], "metadata": %s}',
        '{"messages": [{"role": "user", "content": "a"}], "unknown": %s}',
        '{"messages": [{"role": "user", "content": "a"}], "stop": %s}',
    ],
)
def test_deep_json_is_the_clients_mistake(make_app, call, body, depth):
    content = (body % _nested(depth)).encode()
    response = asyncio.run(call(make_app(), "POST", "/v1/chat/completions", content=content))
    assert response.status_code == 400, response.text
    assert len(response.text) < 1000


@pytest.mark.parametrize("depth", [101, 900, 1023, 1100])
def test_deep_json_in_the_arguments_of_a_call_is_the_clients_mistake(make_app, call, depth):
    for arguments in (_nested(depth), '{"a": ' + _nested(depth) + "}"):
        message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
        response = asyncio.run(
            call(make_app(), "POST", "/v1/chat/completions", json={"messages": [message], "max_tokens": 1})
        )
        assert response.status_code in (200, 400), response.text
        assert len(response.text) < 2000


def _render(source, **kwargs):
    return ChatTemplate(source, {}, origin="here").render([{"role": "user", "content": "hi"}], kwargs=kwargs)


@pytest.mark.parametrize(
    "source",
    [
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'x' * n }}",
        "{{ n * [1, 2] }}",
        "{{ n ** n }}",
        "{% for i in range(90000) %}{{ 'x' * 9000 }}{% endfor %}",
        "{{ none.missing.more }}",
        "{{ messages[0].content.missing() }}",
    ],
)
def test_templates_that_ask_for_too_much_refuse_the_messages(source):
    with pytest.raises(InvalidRequest) as raised:
        _render(source, n=10**12)
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in big %}{{ i }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in big %}{% set x = j.a %}{% endfor %}{% endfor %}",
    ],
)
def test_a_rendering_has_an_end(source):
    sandbox = BoundedSandbox(max_s=0.05)
    with sandbox.limited(), pytest.raises(TemplateTooCostly):
        sandbox.joined(sandbox.from_string(source).generate(big=[{}] * 99999))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("GZIP", lambda raw: gzip.compress(raw[:9]) + gzip.compress(raw[9:])),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda raw: zlib.compress(raw)[2:-4]),
        ("deflate, gzip", lambda raw: gzip.compress(zlib.compress(raw))),
        ("identity", lambda raw: raw),
        ("identity", lambda raw: b"\xef\xbb\xbf" + raw),
        ("gzip", lambda raw: gzip.compress(b"\xef\xbb\xbf" + raw)),
    ],
)
def test_compressed_bodies_and_byte_order_marks(make_app, call, path, encoding, compress):
    content = compress(json.dumps({"messages": CHAT["messages"]}).encode())
    headers = {"Content-Encoding": encoding}
    response = asyncio.run(call(make_app(), "POST", path, content=content, headers=headers))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        ("gzip", gzip.compress(b"{" + b" " * 2**25), 413),
        ("deflate", zlib.compress(b"{" + b" " * 2**25), 413),
        ("gzip, gzip", gzip.compress(gzip.compress(b" " * 2**27)), 413),
        ("gzip", b"no gzip", 400),
        ("gzip", gzip.compress(b'{"messages": []}')[:-9], 400),
        ("deflate", b"\x00\x01", 400),
        ("br", b"x", 415),
        ("gzip, zstd", b"x", 415),
    ],
)
def test_bad_compressed_bodies(make_app, call, encoding, content, status):
    headers = {"Content-Encoding": encoding}
    response = asyncio.run(call(make_app(), "POST", "/v1/chat/completions", content=content, headers=headers))
    assert response.status_code == status, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_bodies_that_arrive_together_have_a_bound(make_app):
    class HalfSent(AsgiCall):
        """Stops before its last byte until it may go on."""

        async def run(self):
            self.arrived, self.go_on = asyncio.Event(), asyncio.Event()
            run_app, self.app = self.app, self._held
            self._inner = run_app
            await super().run()

        async def _held(self, scope, receive, send):
            async def slow():
                message = await receive()
                if message["type"] == "http.request" and not message["more_body"]:
                    self.arrived.set()
                    await self.go_on.wait()
                return message

            await self._inner(scope, slow, send)

    async def scenario():
        app = make_app(max_body_bytes=4096, max_arriving_bytes=6000)
        half = HalfSent(app, "/v1/completions", chunks=[b" " * 4000, json.dumps({"prompt": "a"}).encode()[:90]])
        task = asyncio.create_task(half.run())
        async with asyncio.timeout(DEADLINE_S):
            while not hasattr(half, "arrived"):
                await asyncio.sleep(0)
            await half.arrived.wait()
            refused = AsgiCall(app, "/v1/completions", chunks=[b" " * 4000, b"{}"])
            await refused.run()
            half.go_on.set()
            await task
            later = AsgiCall(app, "/v1/completions", chunks=[b" " * 4000, json.dumps({"prompt": "a"}).encode()[:90]])
            await later.run()
        return half.status, refused, later.status

    half_status, refused, later_status = asyncio.run(scenario())
    assert (half_status, later_status) == (200, 200)
    assert refused.status == 429
    assert "max_arriving_bytes" in refused.text
