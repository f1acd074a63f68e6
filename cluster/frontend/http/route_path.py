"""Where a request goes within the application, which may answer below a prefix. Knows ASGI scopes only."""

from __future__ import annotations

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """Path of an HTTP scope without the prefix at which the application is mounted, as its routes have it."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path
