"""A server that cannot start ends by itself: exit code 2, one line that says why, no process left behind."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from damaged_checkpoints import truncated, with_shape
from live_server import LiveServer, launched

from cluster.model.info import load_model_info
from cluster.policies.policy_state import save_policy_state

pytestmark = pytest.mark.ray

EARLY_S = 20.0  # found before anything is started; seconds of imports on a busy machine
LATE_S = 120.0  # found by the attention worker


def _last_line(server: LiveServer) -> str:
    """The error, which comes alone: no traceback."""
    assert "Traceback" not in server.log, server.log
    errors = [line for line in server.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, server.log
    return errors[0]


def test_truncated_weights_are_found_at_once(tmp_path: Path) -> None:
    with launched(str(truncated(tmp_path / "m"))) as server:
        server.assert_ends(2, EARLY_S)
        assert str(tmp_path / "m" / "model.safetensors") in _last_line(server)
        assert "starting" not in server.log


def test_port_in_use_is_found_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with launched("--port", str(port)) as server:
            server.assert_ends(2, EARLY_S)
            assert f"port {port}" in _last_line(server)


def test_tensor_of_wrong_shape_is_found_by_the_worker(tmp_path: Path) -> None:
    tensor = "model.layers.3.mlp.experts.5.up_proj.weight"
    with launched(str(with_shape(tmp_path / "m", tensor, [256, 64]))) as server:
        server.assert_ends(2, LATE_S)
        assert tensor in _last_line(server)


def test_policy_state_of_another_model_is_found_at_once(tmp_path: Path) -> None:
    path, fingerprint = tmp_path / "learned.npz", load_model_info("moesaic-demo").fingerprint
    save_policy_state(path, "0123456789abcdef", {"maps": {"maps": np.zeros((1, 2, 3))}})
    with launched("--policy-state", str(path)) as server:
        server.assert_ends(2, EARLY_S)
        line = _last_line(server)
        assert str(path) in line and "0123456789abcdef" in line and fingerprint in line
        assert "starting" not in server.log
