"""What eviction and prediction have learned, as named groups of arrays: in a file, and in shares for other workers.

One npz holds version, model fingerprint and "group/field" arrays. Knows arrays; knows nothing of what they mean.

Groups: `maps` (fMoE's past expert maps), `next_use` (moesaic's estimate).
"""

from __future__ import annotations

import io
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol, TypeAlias

import numpy as np

from cluster.errors import ConfigError

POLICY_STATE_VERSION = 1
NUM_LEARNED = "num_learned"

Arrays: TypeAlias = Mapping[str, np.ndarray]
Groups: TypeAlias = Mapping[str, Arrays]

_NARROWED_FROM = 1024  # values; smaller arrays are counts and rates that have to stay exact
_WAY_OUT = "delete it, or name another with experts.policy_state"


class StatefulPolicy(Protocol):
    """A policy that learns: its state is one group."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """An independent copy. NUM_LEARNED, an integer, tells how much went into it: 0 of a fresh one, growing."""
        ...

    def load_arrays(self, arrays: Arrays) -> None:
        """Take in a state, in proportion to how much went into it and into what is here already.

        Raises:
            ConfigError: fields are missing or of other shapes; names both.
        """
        ...


def num_learned(arrays: Arrays) -> int:
    """How much went into a group; 0 where it does not say."""
    return int(arrays[NUM_LEARNED]) if NUM_LEARNED in arrays else 0


def check_finite(arrays: Arrays, source: str) -> None:
    """Numbers that are none would be in every forecast from then on, and in what is told to others.

    Raises:
        ConfigError: names the field.
    """
    for field, array in arrays.items():
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            raise ConfigError(f"{source}: {field} has numbers that are not finite; {_WAY_OUT}")


def save_policy_state(path: Path, fingerprint: str, groups: Groups) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            _write(file, fingerprint, groups, zipfile.ZIP_STORED)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_policy_state(path: Path, fingerprint: str) -> dict[str, dict[str, np.ndarray]]:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, is damaged, not finite, or of another model or version; names the way out.
    """
    try:
        with path.open("rb") as file:
            return _read(file, fingerprint, str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_WAY_OUT}") from error


def check_policy_state(path: Path, fingerprint: str) -> None:
    """Find out at start what would fail later: a file that is none of this model's, or that cannot be written.

    Raises:
        ConfigError: as load_policy_state; or nothing can be saved there.
    """
    if path.exists():
        try:
            with path.open("rb") as file:
                _read(file, fingerprint, str(path), only_header=True)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_WAY_OUT}") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"config field experts.policy_state: {path} cannot be saved, {path.parent} is no directory that can be "
            f"written; make it, or name another file"
        )


def pack_share(fingerprint: str, name: str, arrays: Arrays) -> bytes:
    """A group for other workers: long arrays of floats as float16, all compressed."""
    file = io.BytesIO()
    _write(file, fingerprint, {name: {field: _narrowed(a) for field, a in arrays.items()}}, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def unpack_share(blob: bytes, fingerprint: str, name: str) -> dict[str, np.ndarray]:
    """Inverse of pack_share, but for precision.

    Raises:
        ConfigError: damaged, not finite, or of another model or version.
    """
    source = f"a share of {name}"
    groups = _read(io.BytesIO(blob), fingerprint, source)
    if name not in groups:
        raise ConfigError(f"{source}: has {', '.join(groups) or 'nothing'} instead")
    return groups[name]


def _write(file: IO[bytes], fingerprint: str, groups: Groups, compression: int) -> None:
    fields = {f"{name}/{field}": array for name, arrays in groups.items() for field, array in arrays.items()}
    header = {"version": np.array(POLICY_STATE_VERSION), "fingerprint": np.array(fingerprint)}
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for key, array in (header | fields).items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _read(
    file: IO[bytes], fingerprint: str, source: str, *, only_header: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            version, stored = int(archive["version"]), str(archive["fingerprint"])
            if version != POLICY_STATE_VERSION:
                raise ConfigError(
                    f"{source}: policy state of version {version}, this program has {POLICY_STATE_VERSION}; {_WAY_OUT}"
                )
            if stored != fingerprint:
                raise ConfigError(f"{source}: learned from model {stored}, the model here is {fingerprint}; {_WAY_OUT}")
            groups: dict[str, dict[str, np.ndarray]] = {}
            for key in archive.files:
                name, slash, field = key.partition("/")
                if slash and not only_header:
                    groups.setdefault(name, {})[field] = archive[key]
            for name, arrays in groups.items():
                check_finite(arrays, f"{source}: {name}")
            return groups
    except (ConfigError, OSError):
        raise
    except Exception as error:  # zipfile and numpy raise anything at all for damaged bytes
        raise ConfigError(f"{source}: damaged, or not a file of policy state ({error}); {_WAY_OUT}") from error


def _narrowed(array: np.ndarray) -> np.ndarray:
    if array.size < _NARROWED_FROM or not np.issubdtype(array.dtype, np.floating):
        return array
    largest = np.finfo(np.float16).max
    return np.clip(array, -largest, largest).astype(np.float16)
