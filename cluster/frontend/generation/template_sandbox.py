"""The jinja environment of chat templates: transformers' sandbox, and an end to what one rendering may cost.

A template comes with the checkpoint and runs over what clients send. The sandbox bounds `range`; here time, text and
products are bounded, wherever a template looks something up, calls something or writes something.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_S = 10.0
_MAX_CHARS = 64 * 2**20


class TemplateTooCostly(jinja2.TemplateError):
    """A rendering took too long or wrote too much."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Renders within `limited`; threads may share it."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *, max_s: float = _MAX_S, max_chars: int = _MAX_CHARS, **options: Any) -> None:
        super().__init__(**options)
        self._max_s, self._max_chars = max_s, max_chars
        self._running = threading.local()

    @contextmanager
    def limited(self) -> Generator[None]:
        """The time of this thread's rendering begins."""
        self._running.end_s = time.monotonic() + self._max_s
        try:
            yield
        finally:
            del self._running.end_s

    def joined(self, pieces: Iterable[str]) -> str:
        """What a rendering writes.

        Raises:
            TemplateTooCostly: it takes too long, or is too long.
        """
        texts: list[str] = []
        num_chars = 0
        for text in pieces:
            self._check_time()
            num_chars += len(text)
            self._check_size(num_chars)
            texts.append(text)
        return "".join(texts)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check_time()
        return super().getitem(obj, argument)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._check_time()
        for many, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(many, "__len__") and isinstance(times, int):
                self._check_size(len(many) * times)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_size(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)

    def _check_time(self) -> None:
        if time.monotonic() > getattr(self._running, "end_s", float("inf")):
            raise TemplateTooCostly(f"rendering took longer than {self._max_s:g} s")

    def _check_size(self, num_chars: int) -> None:
        if num_chars > self._max_chars:
            raise TemplateTooCostly(f"rendering made more than {self._max_chars} characters")
