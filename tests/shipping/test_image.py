"""The Dockerfile, as far as it can be checked without Docker. That what it copies makes a wheel: see test_wheel.py."""

from __future__ import annotations

from fnmatch import fnmatch

from dockerfile import ROOT, copied, instructions


def test_everything_copied_is_there_and_in_the_build_context() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*", "what is not named stays out"
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == copied()
    for source in copied():
        assert (ROOT / source).exists(), source


def test_the_build_context_has_no_bytecode_and_no_compiled_kernels() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    for left_out in ("actors/__pycache__", "actors/kernels/_native.cpython-311-x86_64-linux-gnu.so"):
        assert any(fnmatch(left_out, pattern) for pattern in patterns if pattern.startswith("**/"))


def test_the_image_runs_as_the_user_of_the_chart_and_starts_the_server() -> None:
    found = dict(instructions())
    assert found["USER"] == ["1000:1000"]
    assert "moesaic" in " ".join(found["CMD"]) and "0.0.0.0" in " ".join(found["CMD"])
