"""Routes below a prefix too: for a proxy that forwards `/llm/v1/...` without taking `/llm` off. Pure ASGI."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class RootPath:
    """Takes the prefix off paths that begin with it; the others are served as they are."""

    def __init__(self, app: ASGIApp, *, prefix: str) -> None:
        """Args: prefix: begins with a slash and does not end with one."""
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._prefix + "/"):
            scope = {**scope, "path": scope["path"].removeprefix(self._prefix)}
            scope.pop("raw_path", None)  # it would still have the prefix
        await self._app(scope, receive, send)
