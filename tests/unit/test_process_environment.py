"""What a start finds around it: mended where it may be, refused in one line where not."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import httpx
import pytest

from cluster.errors import ConfigError
from cluster.process_environment import check_temporary_directory, settle_environment


def _settled(**environ: str) -> dict[str, str]:
    settle_environment(environ)
    return environ


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_children_do_not_look_for_modules_in_their_working_directory() -> None:
    assert _settled()["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_loopback_needs_no_proxy_and_what_is_set_stays(name: str) -> None:
    environ = _settled(**{name: "internal.example,localhost", "http_proxy": "http://proxy:3128"})
    for each in ("no_proxy", "NO_PROXY"):
        hosts = environ[each].split(",")
        assert {"internal.example", "localhost", "127.0.0.1", "::1"} == set(hosts) and len(hosts) == 4
    assert environ["http_proxy"] == "http://proxy:3128"


def test_grpc_has_a_list_of_its_own() -> None:
    assert "127.0.0.1" in _settled(no_grpc_proxy="x")["no_grpc_proxy"]
    assert "no_grpc_proxy" not in _settled()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_our_http_client_goes_to_loopback_directly(host: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.2:9")
    for name, value in _settled(**{variable: "http://127.0.0.2:9"}).items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:
        direct = client._transport_for_url(httpx.URL(f"http://{host}:8000/ready"))
        elsewhere = client._transport_for_url(httpx.URL("http://example.com/"))
        assert direct is client._transport and elsewhere is not client._transport


@pytest.mark.parametrize("home", ["/", "/nosuch", "/proc"])
def test_a_home_that_cannot_be_written_is_replaced(home: str, temporary: Path) -> None:
    environ = _settled(HOME=home)
    new = Path(environ["HOME"])
    assert new.parent == temporary and new.stat().st_mode & 0o777 == 0o700
    assert _settled(HOME=home)["HOME"] == str(new), "the same for the next start"


def test_a_home_that_can_be_written_stays(tmp_path: Path) -> None:
    assert _settled(HOME=str(tmp_path))["HOME"] == str(tmp_path)


def test_models_in_a_read_only_home_are_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setattr("cluster.process_environment._is_writable", lambda directory: directory != home)
    environ = _settled(HOME=str(home))
    assert environ["HF_HOME"] == str(home / ".cache" / "huggingface") and environ["HOME"] != str(home)
    assert _settled(HOME=str(home), HF_HOME="/models")["HF_HOME"] == "/models"


def test_somebody_elses_directory_is_no_home(temporary: Path) -> None:
    (temporary / f"moesaic-home-{os.getuid()}").symlink_to("/proc")
    assert Path(_settled(HOME="/")["HOME"]).resolve() != Path("/proc")


def test_a_user_whom_the_system_does_not_know_gets_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", unknown)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert _settled()["LOGNAME"] == "uid12345"
    assert "LOGNAME" not in _settled(USER="ann")


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_temporary_directory_is_refused(name: str) -> None:
    path = "/tmp/" + "x" * 80
    with pytest.raises(ConfigError, match="RAY_TMPDIR") as raised:
        check_temporary_directory({name: path})
    assert path in raised.value.message and "107" in raised.value.message


def test_a_short_one_of_rays_own_helps(temporary: Path) -> None:
    check_temporary_directory({"TMPDIR": "/tmp/" + "x" * 80, "RAY_TMPDIR": "/tmp"})
    check_temporary_directory({})


def test_one_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"/proc.*RAY_TMPDIR"):
        check_temporary_directory({"TMPDIR": "/proc"})
