"""What this process and those that it starts find around them: home, user name, proxies, import path, temporary files.

Each is mended where it would stop a start that has nothing to do with it. Knows environment variables; nothing of Ray's
or torch's own but which variables they read.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from cluster.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")

_SOCKET_PATH_BYTES = 107  # of AF_UNIX (Linux)
# What Ray puts below its directory: the longest of its sockets, with the largest process number.
_LONGEST_BELOW = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def settle_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Mend what can be mended; idempotent.

    - Modules of the user's working directory never stand in for ours or the standard library's, in any child.
    - Proxies are not asked for what is on this machine.
    - A home that cannot be written (read-only, or `/` of a user whom the system does not know) is another one.
    """
    environ.setdefault("PYTHONSAFEPATH", "1")
    _leave_loopback_direct(environ)
    _give_user_name(environ)
    _give_home(environ)


def check_temporary_directory(environ: MutableMapping[str, str] = os.environ) -> None:
    """Whether Ray can put its sockets there.

    Raises:
        ConfigError: the path is too long, or nothing can be written there; says which variable to set.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in environ else "TMPDIR"
    directory = environ.get(name, "/tmp")
    most = _SOCKET_PATH_BYTES - _LONGEST_BELOW
    if (length := len(os.fsencode(directory.rstrip("/")))) > most:
        raise ConfigError(
            f"{name} is {directory}, {length} bytes: sockets below it have names of at most {_SOCKET_PATH_BYTES}, so "
            f"it may have {most}; set RAY_TMPDIR to a directory with a shorter name"
        )
    if not _is_writable(Path(directory)):
        raise ConfigError(
            f"{name} is {directory}, where nothing can be written; set RAY_TMPDIR to a directory where it can"
        )


def _leave_loopback_direct(environ: MutableMapping[str, str]) -> None:
    """Both spellings: programs read the one or the other."""
    names = ["no_proxy", "NO_PROXY"] + (["no_grpc_proxy"] if "no_grpc_proxy" in environ else [])
    given = [environ.get(name, "") for name in names]
    hosts = [host.strip() for value in given for host in value.split(",") if host.strip()]
    for name in names:
        environ[name] = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))


def _give_user_name(environ: MutableMapping[str, str]) -> None:
    """torch and others ask for one to name their directories, and fail where the system knows none."""
    if any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environ["LOGNAME"] = environ["USER"] = f"uid{os.getuid()}"


def _give_home(environ: MutableMapping[str, str]) -> None:
    """A private home below the temporary directory; models that the hub's cache has in the old one are still found."""
    try:
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError:  # the system does not know this user
        home = Path("/")
    if home != Path("/") and _is_writable(home):
        return
    cache = home / ".cache" / "huggingface"
    if cache.is_dir():
        environ.setdefault("HF_HOME", str(cache))
    new = Path(tempfile.gettempdir()) / f"moesaic-home-{os.getuid()}"
    try:
        new.mkdir(mode=0o700, exist_ok=True)
        is_ours = new.stat().st_uid == os.getuid() and not new.is_symlink()
    except OSError:
        is_ours = False
    environ["HOME"] = str(new) if is_ours else tempfile.mkdtemp(prefix="moesaic-home-")


def _is_writable(directory: Path) -> bool:
    """By trying: a read-only file system says nothing in the mode."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False
