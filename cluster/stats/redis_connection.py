"""One lazily opened connection pool to Redis, its errors as `ConnectionError`, and the names of keys.

The only file that imports redis.
"""

# redis-py declares **kwargs without types.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from cluster.errors import ConfigError
from cluster.network.addresses import join_address

if TYPE_CHECKING:
    import redis

Argument: TypeAlias = str | bytes | int | float


class RedisConnection:
    """Connects on first use and again by itself after a failure."""

    def __init__(self, url: str, timeout_s: float, key_prefix: str) -> None:
        """Args: key_prefix: of the application, so that several can share a server.

        Raises: ConfigError: `url` is not a Redis URL.
        """
        self._key_prefix = key_prefix
        self._client = _connect_lazily(url, timeout_s)
        kwargs = self._client.connection_pool.connection_kwargs
        host = kwargs.get("host")
        self.address = (
            f"redis://{join_address(host, kwargs.get('port', 6379))}" if host else f"unix://{kwargs.get('path')}"
        )

    def key(self, fingerprint: str, kind: str) -> str:
        """The key of one kind of data of the application's model `fingerprint`."""
        return f"moesaic:v3:{self._key_prefix}:{fingerprint}:{kind}"

    def ping(self) -> None:
        """Return if the server answers, raise `ConnectionError` if not."""
        with self._translated_errors():
            self._client.ping()

    def script(self, source: str) -> RedisScript:
        """A Lua script that is sent by its digest once the server knows it."""
        return RedisScript(self, self._client.register_script(source))

    def run(self, script: Any, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """What the script returns, or ConnectionError."""
        with self._translated_errors():
            return script(keys=keys, args=args)

    @contextlib.contextmanager
    def _translated_errors(self) -> Generator[None]:
        import redis

        try:
            yield
        except redis.RedisError as error:
            raise ConnectionError(f"{self.address}: {error}") from error


def check_redis(url: str, *, connect: bool, timeout_s: float = 2.0) -> None:
    """Whether `redis.url` can be right. A server that is only away now is no mistake: counts wait for it.

    Raises:
        ConfigError: no Redis URL; or, if it may `connect`, an unknown host, a wrong password, or no Redis there.
    """
    connection = RedisConnection(url, timeout_s, "")  # reads and writes nothing
    parts = urlsplit(url)
    if parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path):  # redis-py takes it for database 0
        raise ConfigError(f"config field redis.url: {parts.path[1:]!r} is no number of a database; give /0 or nothing")
    if not connect:
        return
    import redis

    try:
        connection.ping()
    except ConnectionError as error:
        cause = error.__cause__
        refused = (redis.AuthenticationError, redis.ResponseError, redis.InvalidResponse)
        if isinstance(cause, refused) or _is_for_good(cause):
            raise ConfigError(
                f"config field redis.url: {error}; give redis://[:password@]host:port/db of a Redis or Valkey server, "
                f"or leave it out for one of our own"
            ) from error


def _is_for_good(error: BaseException | None) -> bool:
    """Whether waiting would not help: the name of the host stands for nothing, or the server does not speak TLS."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, ssl.SSLError):
            return True
        if isinstance(error, socket.gaierror):
            return error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


class RedisScript:
    """One atomic step on the server."""

    def __init__(self, connection: RedisConnection, script: Any) -> None:
        self._connection = connection
        self._script = script

    def __call__(self, keys: Sequence[str], args: Sequence[Argument] = ()) -> Any:
        """Run it. Raises: ConnectionError."""
        return self._connection.run(self._script, keys, args)


def _connect_lazily(url: str, timeout_s: float) -> redis.Redis:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        return redis.Redis.from_url(  # no retry inside: additions are not idempotent, and callers probe later
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise ConfigError(f"config field redis.url: {error}") from error
