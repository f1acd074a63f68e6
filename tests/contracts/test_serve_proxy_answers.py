"""What Serve's proxy says by itself reaches clients as our errors; its words are Serve's own, made by its own code."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fakes import AsgiCall
from ray.serve._private import constants
from ray.serve._private.common import DeploymentID
from ray.serve._private.http_util import (
    call_function_from_import_path,  # the name under which Serve calls us
    get_http_response_status,
    send_http_response_on_exception,
    validate_http_proxy_callback_return,
)
from ray.serve._private.proxy import HTTPProxy
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.frontend.serve_proxy.answers import PROXY_ENVIRONMENT, ProxyAnswers

PATH = "/v1/completions"
BODY = {"model": "m", "prompt": "x"}


class ServeProxy:
    """A Serve proxy: its routes, and what becomes of a request that has one."""

    def __init__(self, *routes: str, fails_with: BaseException | None = None) -> None:
        self.routes = dict.fromkeys(routes, "app")
        self.fails_with = fails_with
        self.lives = True
        self.paused = asyncio.Event()
        self.resume = asyncio.Event()
        self.paths: list[str] = []

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/-/routes":
            status, text = (200, json.dumps(self.routes)) if self.routes else (503, "no routes")
            return await _send(send, status, text.encode(), b"application/json")
        self.paths.append(scope["path"])
        if not any(scope["path"].startswith(route) for route in self.routes):
            async for message in HTTPProxy.not_found_response(cast(Any, None), cast(Any, SimpleNamespace(**scope))):
                if isinstance(message, dict):
                    await send(message)
            return None
        if self.fails_with is not None:
            status = get_http_response_status(self.fails_with, 600.0, "an-id")
            for message in send_http_response_on_exception(status, response_started=False):
                await send(message)
            return None
        if not self.lives or (not scope["path"].endswith("/health") and scope["path"] == "/slow"):
            self.paused.set()
            await self.resume.wait()
        return await _send(send, 404 if "missing" in scope["path"] else 200, b"by the application", b"text/plain")


async def _send(send, status, body, kind):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


def ask(proxy: ServeProxy, path: str = PATH, *calls: str) -> AsgiCall:
    """The last answer of one proxy to several requests."""

    async def scenario():
        app = ProxyAnswers(proxy, silent_s=0.02, first_probe_s=0.05, probe_s=0.05)
        for before in calls:
            await AsgiCall(app, before, BODY).run()
        call = AsgiCall(app, path, BODY)
        await asyncio.wait_for(call.run(), 10)
        return call

    return asyncio.run(scenario())


def headers_of(call: AsgiCall) -> dict[str, str]:
    start = next(message for message in call.sent if message["type"] == "http.response.start")
    return {name.decode().lower(): value.decode() for name, value in start["headers"]}


def assert_error(call: AsgiCall, status: int, kind: str) -> None:
    assert call.status == status
    assert json.loads(call.text)["error"]["type"] == kind
    assert headers_of(call)["content-type"] == "application/json"
    assert ("retry-after" in headers_of(call)) == (status in (429, 503))


@pytest.mark.parametrize("path", [PATH, "/v1/models", "/anything", "/health", "/metrics"])
def test_no_application_yet_is_a_503_that_invites_to_come_again(path):
    assert_error(ask(ServeProxy(), path), 503, "service_unavailable_error")


def test_ready_tells_starting_from_draining():
    call = ask(ServeProxy(), "/ready")
    assert (call.status, json.loads(call.text)["phase"]) == (503, "starting")

    async def scenario():
        proxy = ServeProxy("/")
        app = ProxyAnswers(proxy)
        await AsgiCall(app, "/health").run()
        proxy.routes = {}  # the application has been removed
        call = AsgiCall(app, "/ready")
        await call.run()
        return call

    call = asyncio.run(scenario())
    assert (call.status, json.loads(call.text)["phase"]) == (503, "draining")


def test_path_outside_every_application_is_not_found():
    assert_error(ask(ServeProxy("/llm"), "/other"), 404, "invalid_request_error")


def test_route_that_comes_just_after_the_proxy_had_none_is_one_that_is_starting():
    class Late(ServeProxy):
        async def __call__(self, scope, receive, send):
            await super().__call__(scope, receive, send)
            self.routes = {"/": "app"}

    assert_error(ask(Late(), "/v1/models"), 503, "service_unavailable_error")
    assert_error(ask(Late("/other"), "/v1/models"), 503, "service_unavailable_error")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (TimeoutError(), 504, "timeout_error"),
        (BackPressureError(9, 8), 429, "rate_limit_error"),
        (BackPressureError(9, 8, status_code=429, retry_after_s=3), 429, "rate_limit_error"),
        (DeploymentUnavailableError(DeploymentID("HttpIngress", "moesaic")), 503, "service_unavailable_error"),
        (RuntimeError("the replica died"), 503, "service_unavailable_error"),  # Serve sends nothing at all then
    ],
)
def test_failures_of_the_proxy_are_ours(error, status, kind):
    assert_error(ask(ServeProxy("/", fails_with=error)), status, kind)


def test_front_end_that_does_not_come_is_not_waited_for():
    proxy = ServeProxy("/")
    proxy.lives = False
    assert_error(ask(proxy), 503, "service_unavailable_error")
    assert proxy.paths == [PATH, "/health"]


def test_front_end_that_dies_is_not_waited_for():
    async def scenario():
        proxy = ServeProxy("/")
        app = ProxyAnswers(proxy, silent_s=0.02, first_probe_s=0.05, probe_s=0.05)
        await AsgiCall(app, "/health").run()
        proxy.lives = False
        calls = [AsgiCall(app, PATH, BODY) for _ in range(20)]
        await asyncio.wait_for(asyncio.gather(*(call.run() for call in calls)), 10)
        return proxy, calls

    proxy, calls = asyncio.run(scenario())
    for call in calls:
        assert_error(call, 503, "service_unavailable_error")
    assert proxy.paths.count("/health") < 20  # they share probes


def test_slow_answer_of_a_living_front_end_is_waited_for():
    async def scenario():
        proxy = ServeProxy("/")
        app = ProxyAnswers(proxy, silent_s=0.01, first_probe_s=5, probe_s=5)
        call = AsgiCall(app, "/slow", BODY)
        task = asyncio.create_task(call.run())
        await proxy.paused.wait()
        async with asyncio.timeout(10):
            while proxy.paths.count("/health") < 3:  # asked again and again, and it lives
                await asyncio.sleep(0)
        proxy.resume.set()
        await task
        return call

    call = asyncio.run(scenario())
    assert (call.status, call.text) == (200, "by the application")


def test_leaving_client_ends_the_request_in_the_proxy():
    async def scenario():
        proxy = ServeProxy("/")
        task = asyncio.create_task(AsgiCall(ProxyAnswers(proxy), "/slow", BODY).run())
        await proxy.paused.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


@pytest.mark.parametrize(("path", "status"), [("/page", 200), ("/missing", 404)])
def test_answers_of_applications_pass_untouched(path, status):
    call = ask(ServeProxy("/"), path)
    assert (call.status, call.text) == (status, "by the application")


def test_serve_finds_the_middleware_where_the_environment_names_it():
    path = PROXY_ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    (name,) = PROXY_ENVIRONMENT
    assert hasattr(constants, name), "Serve reads this name; misspelt it would be ignored"
    made = validate_http_proxy_callback_return(call_function_from_import_path(path))
    assert ProxyAnswers in [middleware.cls for middleware in made]
