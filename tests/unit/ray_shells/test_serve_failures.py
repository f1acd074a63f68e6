"""Serve's page about a replica is read for the one line that is ours."""

from __future__ import annotations

from actors.ray_shells.serve_failures import first_line, reason_of

_PAGE = """The deployment failed to start 3 times in a row. See controller logs for details. Error:
Traceback (most recent call last):
  File "python/ray/_raylet.pyx", line 1, in ray._raylet.task
cluster.errors.CheckpointError: a cause

The above exception was the direct cause of the following exception:

ray.exceptions.RayTaskError: ray::ServeReplica:moesaic:AttentionWorker.initialize_and_get_metadata() (pid=1, ip=1.2.3.4)
    raise ConfigError(...)
cluster.errors.ConfigError: config field attention.kv_cache: 1MiB is 3 blocks; give at least 5 bytes
"""


def test_the_replicas_own_reason() -> None:
    assert reason_of(_PAGE) == "config field attention.kv_cache: 1MiB is 3 blocks; give at least 5 bytes"


def test_none_where_there_is_none() -> None:
    assert reason_of("A replica's health check failed.") is None


def test_first_line_of_a_page() -> None:
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(TimeoutError()) == "TimeoutError"
