"""Settings that are each in range and cannot work together. Pure: looks at no file, port or machine."""

from __future__ import annotations

from cluster.config.load import MoesaicConfig
from cluster.errors import ConfigError


def impossible_settings(config: MoesaicConfig) -> list[str]:
    """One line for each combination that cannot work: the fields, the numbers and the way out."""
    experts, problems = config.experts, list[str]()
    if config.grpc.enabled and config.grpc.port == config.frontend.port:
        problems.append(
            f"config fields frontend.port, grpc.port: port {config.grpc.port} is wanted by HTTP and by gRPC; "
            f"change --port or --grpc-port"
        )
    if experts.max_hosts is not None and not experts.hosts:
        problems.append(
            f"config field experts.max_hosts: {experts.max_hosts} with experts.hosts 0: hosts are added to hosts that "
            f"there are; set experts.hosts to at least 1, or leave max_hosts out"
        )
    if (
        experts.max_hosts is not None
        and experts.max_hosts > experts.hosts > 0
        and config.scheduler.placement == "fixed"
    ):
        problems.append(
            f"config field experts.max_hosts: {experts.max_hosts} above experts.hosts {experts.hosts} with "
            f"scheduler.placement fixed: hosts that load starts would own nothing; set placement to auto, or leave "
            f"max_hosts out"
        )
    return problems


def check_possible(config: MoesaicConfig) -> None:
    """Raises: ConfigError: all that cannot work together."""
    if problems := impossible_settings(config):
        raise ConfigError.of(problems)
