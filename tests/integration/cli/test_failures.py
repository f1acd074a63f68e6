"""Every failure is one line on stderr and an exit code; help stays quick."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from live_server import COMMAND, clean_environment, free_port
from typer.testing import Result

from cluster.config.renamed import RENAMED_FLAGS
from cluster.errors import ConfigError
from cluster.model.info import load_model_info
from cluster.policies.policy_state import save_policy_state
from cluster.stats.embedded_valkey import start_embedded_valkey
from cluster.stats.redis_connection import check_redis

Run = Callable[..., Result]


def _assert_one_line(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["serve", "nosuch-model"], ["nosuch-model", "moesaic-demo"]),
        (["serve", "--expert-cache", "12XB"], ["cache", "12XB", "512MiB"]),
        (["serve", "--kv-cache", "lots"], ["kv_cache", "lots"]),
        (["serve", "--expert-cache", "900%"], ["experts.cache", "900%", "100%"]),
        (["serve", "--dtype", "int3"], ["dtype", "int3"]),
        (["serve", "--eviction", "belady"], ["experts.eviction", "belady", "lru"]),
        (["serve", "--prediction", "oracle"], ["experts.prediction", "oracle", "next-gate"]),
        (["serve", "--ram-tier", "auto"], ["ram_tier", "auto"]),
        (["serve", "--link-gb-per-s", "-1"], ["link_gb_per_s", "-1"]),
        (["serve", "--max-model-len", "999999"], ["max_model_len", "999999", "2048"]),
        (["serve", "--port", "99999"], ["port", "99999"]),
        (["serve", "--config", "/nosuch.yaml"], ["/nosuch.yaml"]),
        (["serve", "--host", "no.such.host.invalid"], ["no.such.host.invalid", "--host"]),
        (["generate", "--prompt", ""], ["prompt is empty"]),
        (["generate", "--prompt", "x", "--url", "ftp://x"], ["ftp://x"]),
        (["bench", "serve", "--rate", "1", "--concurrency", "1"], ["--trace"]),
        (["bench", "serve", "--rate", "0"], ["rate"]),
        (["bench", "serve", "--prompts", "/nosuch.jsonl"], ["/nosuch.jsonl"]),
        (["convert", "widen", "moesaic-demo", "/tmp", "--factor", "2"], ["/tmp", "exists"]),
    ],
)
def test_wrong_input_is_one_line(run: Run, args: list[str], parts: list[str]) -> None:
    _assert_one_line(run(*args), 2, *parts)


@pytest.mark.parametrize("command", [["status"], ["generate", "--prompt", "x"], ["chat"], ["bench", "serve"]])
def test_server_away(run: Run, command: list[str]) -> None:
    _assert_one_line(run(*command, "--url", "http://127.0.0.1:1"), 1, "http://127.0.0.1:1", "moesaic serve")


def test_port_in_use(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _assert_one_line(run("serve", "--port", str(port)), 2, f"port {port}", "--port")
        free = str(free_port())
        _assert_one_line(run("serve", "--port", free, "--grpc-port", str(port)), 2, f"port {port}", "--grpc-port")
        _assert_one_line(run("serve", "--port", free, "--grpc-port", free), 2, f"port {free}", "--grpc-port")


def test_half_of_tls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC__GRPC__TLS_CERT", "/some.pem")
    _assert_one_line(run("serve"), 2, "grpc", "tls_key")


def test_unknown_key_in_config_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("experts:\n  cash: 1\n")
    _assert_one_line(run("serve", "--config", str(path)), 2, "experts.cash")


@pytest.mark.parametrize(("old", "new"), RENAMED_FLAGS.items())
@pytest.mark.parametrize("command", ["serve", "chat", "generate"])
def test_an_old_flag_is_refused_with_the_new_one(run: Run, command: str, old: str, new: str) -> None:
    for args in ([old, "1"], [f"{old}=1"]):
        _assert_one_line(run(command, *args), 2, f"{old} is called {new} now")
    assert f"{new} " in run(command, "--help").stdout


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.cli.flags.read_config", interrupt)
    assert run("serve").exit_code == 130


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("moesaic ")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom cluster.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'pydantic', 'httpx', 'redis') if m in sys.modules])\n"
    )
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_policy_state_that_cannot_be_used(run: Run, tmp_path: Path) -> None:
    """Found before anything is started."""

    def serve(path: Path) -> Result:
        ports = ["--port", str(free_port()), "--grpc-port", str(free_port())]
        return run("serve", *ports, "--policy-state", str(path))

    other, damaged = tmp_path / "other.npz", tmp_path / "damaged.npz"
    save_policy_state(other, "0123456789abcdef", {})
    fingerprint = load_model_info("moesaic-demo").fingerprint
    _assert_one_line(serve(other), 2, str(other), "0123456789abcdef", fingerprint, "experts.policy_state")
    save_policy_state(damaged, fingerprint, {})
    damaged.write_bytes(damaged.read_bytes()[:-30])
    _assert_one_line(serve(damaged), 2, str(damaged), "damaged", "delete it")
    _assert_one_line(serve(tmp_path), 2, "cannot be read (Is a directory)")
    missing = tmp_path / "none" / "learned.npz"
    _assert_one_line(serve(missing), 2, str(missing), "no directory that can be written", "make it")


def test_everything_wrong_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is found outside the settings: model, ports, TLS files, Redis."""
    monkeypatch.setenv("MOESAIC__GRPC__TLS_CERT", str(tmp_path / "cert.pem"))
    monkeypatch.setenv("MOESAIC__GRPC__TLS_KEY", str(tmp_path / "key.pem"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run("serve", "nosuch-model", "--port", port, "--redis-url", "http://x")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for part in ("nosuch-model", port, "cert.pem", "redis.url"):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 4


@pytest.mark.parametrize("words", [["generate", "--prompt", "-"], ["bench", "serve", "--prompts", "-"]])
def test_input_that_is_not_utf_8(tmp_path: Path, words: list[str]) -> None:
    """Standard input and files alike; by the real program, since a runner decodes by itself."""
    path = tmp_path / "input"
    path.write_bytes(b"caf\xe9 \xff\n")
    if words[0] == "bench":
        words = [*words[:-1], str(path), "--url", "http://127.0.0.1:1"]
    with path.open("rb") as file:
        done = subprocess.run(
            [str(COMMAND), *words],
            stdin=file,
            env=clean_environment(PYTHONUTF8="1", PYTHONIOENCODING="utf-8:strict"),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "utf-8" in line.lower()


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_directory_with_a_long_name(run: Run, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Names of sockets below it would have more bytes than the system takes."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, "/tmp/" + "x" * 90)
    _assert_one_line(_serve(run), 2, variable, "x" * 90, "set RAY_TMPDIR", "107")


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("http://x", "redis://"),
        ("redis+sentinel://a:1/0", "redis://"),
        ("redis://h:port/0", "port"),
        ("redis://h:99999/0", "0-65535"),
        ("redis://127.0.0.1:1/zero", "zero"),
        ("redis://[::1", "IPv6"),
        ("redis://no.such.host.invalid:1/0", "no.such.host.invalid"),
    ],
)
def test_redis_urls_that_cannot_be(run: Run, url: str, part: str) -> None:
    _assert_one_line(_serve(run, "--redis-url", url), 2, "redis.url", part)


def test_redis_that_refuses(tmp_path: Path) -> None:
    """A server that answers, and never will do what is asked; one that is away is waited for."""
    valkey = start_embedded_valkey(tmp_path)
    try:
        address = f"127.0.0.1:{valkey.port}"
        for url in (f"redis://{address}/0", f"redis://:hunter2@{address}/0", valkey.url.replace("/0", "/99")):
            with pytest.raises(ConfigError, match=r"redis\.url") as raised:
                check_redis(url, connect=True)
            assert address in raised.value.message and "hunter2" not in raised.value.message
        check_redis(valkey.url, connect=True)
    finally:
        valkey.stop()
    check_redis(valkey.url, connect=True)


def _serve(run: Run, *flags: str) -> Result:
    return run("serve", "--port", str(free_port()), "--grpc-port", str(free_port()), *flags)
