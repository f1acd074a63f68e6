"""What can be found wrong before Ray starts, all at once: settings, model files, ports, TLS files, Redis.

Where another cluster is joined, files, ports and Redis are those of its nodes: they look for themselves.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.config.load import MoesaicConfig
    from cluster.config.sections import ModelConfig


class _UnknownHost(ConfigError):
    """The name of the host stands for nothing."""


def check_settings(config: MoesaicConfig) -> None:
    """Raises: ConfigError: everything that is wrong with `config` on this machine."""
    from cluster.config.check import check_possible
    from cluster.process_environment import check_temporary_directory

    problems: list[str] = []
    here = config.ray.address is None
    _gather(problems, lambda: check_possible(config))
    _check_ports(config, problems)
    _gather(problems, lambda: _check_length(config))
    _gather(problems, lambda: check_files(config.model, config.experts.policy_state if here else None))
    if here:
        _gather(problems, check_temporary_directory)
        _gather(problems, lambda: _check_tls(config))
    _gather(problems, lambda: _check_redis(config.redis.url, connect=here))
    if problems:
        raise ConfigError.of(problems)


def check_files(model: ModelConfig, policy_state: str | None) -> None:
    """Find damaged or missing files before anything is started; reads headers, no weights.

    Raises:
        CheckpointError: names the file and the tensor.
        ConfigError: the file of policy state is damaged or of another model, or none can be saved there.
    """
    from cluster.frontend.generation.tokenizer import Tokenizer
    from cluster.model.info import read_model_info, resolve_model
    from cluster.model.safetensors_index import read_index
    from cluster.policies.policy_state import check_policy_state

    directory = resolve_model(model.path)
    read_index(directory)
    Tokenizer.load(directory)
    if policy_state is not None:
        check_policy_state(Path(policy_state), read_model_info(model).fingerprint)


def check_port_is_free(host: str, port: int, *, host_option: str = "--host", port_option: str = "--port") -> None:
    """Raise `ConfigError` if this address cannot be listened on; says why and what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise _UnknownHost(f"host {host!r}: {reason}; choose another with {host_option}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed one may linger
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                way_out = f"stop the program that listens there, or choose another port with {port_option}"
                raise ConfigError(f"port {port} on {host} is in use; {way_out}") from error
            way_out = f"see {host_option}, {port_option}"
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; {way_out}") from error


def _gather(problems: list[str], check: Callable[[], None], *, but: type[ConfigError] | None = None) -> None:
    """Keep what is wrong; `but` goes on to the caller."""
    try:
        check()
    except ConfigError as error:
        if but is not None and isinstance(error, but):
            raise
        problems.extend(problem for problem in error.problems if problem not in problems)


def _check_ports(config: MoesaicConfig, problems: list[str]) -> None:
    frontend, grpc = config.frontend, config.grpc
    try:
        _gather(problems, lambda: check_port_is_free(frontend.host, frontend.port), but=_UnknownHost)
    except _UnknownHost as error:
        problems.append(error.message)
        if grpc.host is None:
            return  # the same would be said twice
    if grpc.enabled and grpc.port != frontend.port:
        host, option = (grpc.host, "grpc.host") if grpc.host else (frontend.host, "--host")
        _gather(problems, lambda: check_port_is_free(host, grpc.port, host_option=option, port_option="--grpc-port"))


def _check_length(config: MoesaicConfig) -> None:
    from cluster.model.info import read_model_info

    model = config.model
    read_model_info(model)


def _check_tls(config: MoesaicConfig) -> None:
    from cluster.frontend.security.tls_files import read_tls_files

    if config.grpc.enabled:
        read_tls_files(config.grpc)


def _check_redis(url: str | None, *, connect: bool) -> None:
    from cluster.stats.redis_connection import check_redis

    if url is not None:
        check_redis(url, connect=connect)
