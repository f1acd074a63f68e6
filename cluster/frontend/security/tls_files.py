"""The TLS files of a configuration: read and checked where they are used, and before anything is started."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config.sections import GrpcConfig
from cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM texts. `client_ca` None: clients need no certificate."""

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


def read_tls_files(config: GrpcConfig) -> TlsFiles | None:
    """The files that the configuration names; None: plain text is configured.

    Raises:
        ConfigError: one is missing, no PEM file, or the two do not belong together; names the field.
    """
    if config.tls_cert is None:
        return None
    chain, key = _read_pem("tls_cert", config.tls_cert), _read_pem("tls_key", config.tls_key)
    client_ca = None if config.tls_client_ca is None else _read_pem("tls_client_ca", config.tls_client_ca)
    try:  # gRPC would only say that it cannot listen
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password=lambda: b"")
    except ssl.SSLError as error:
        files = f"{config.tls_cert} and {config.tls_key}"
        raise ConfigError(f"config fields grpc.tls_cert, grpc.tls_key: {files}: {error.reason}") from error
    return TlsFiles(chain, key, client_ca)


def _read_pem(field_name: str, path: str | None) -> bytes:
    try:
        raw = Path(path or "").read_bytes()
    except OSError as error:
        raise ConfigError(f"config field grpc.{field_name}: {path}: {error.strerror}") from error
    if b"-----BEGIN" not in raw:
        raise ConfigError(f"config field grpc.{field_name}: {path} is not a PEM file")
    return raw
