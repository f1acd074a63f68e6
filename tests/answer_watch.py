"""Asks a server all the time, from before its port is open until it is closed: whatever it answers must be ours."""

from __future__ import annotations

import threading
from typing import Self

import httpx

_PATHS = ("/v1/completions", "/v1/models", "/ready")
_EVERY_S = 0.05


class AnswerWatch:
    """A thread that asks while the `with` block lasts."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.answers: list[tuple[str, httpx.Response]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def assert_all_ours(self) -> None:
        """Each is a success, or a 503 in our form that says when to come again; there was one of these at least."""
        for path, answer in self.answers:
            if answer.status_code == 200:
                continue
            assert answer.status_code == 503, (path, answer.status_code, answer.text)
            assert int(answer.headers["retry-after"]) >= 1
            key = "phase" if path == "/ready" else "error"
            assert key in answer.json(), (path, answer.text)
        assert any(answer.status_code == 503 for _, answer in self.answers)

    def _ask(self) -> None:
        body = {"model": "moesaic-demo", "prompt": "x", "max_tokens": 1}
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.wait(_EVERY_S):
                for path in _PATHS:
                    try:
                        answer = client.post(path, json=body) if path == _PATHS[0] else client.get(path)
                    except httpx.TransportError:  # not listening, or closed within a request
                        continue
                    self.answers.append((path, answer))
