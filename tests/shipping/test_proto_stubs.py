"""`cluster/rpc/` is what `make proto` writes today, and the messages can live beside those of other programs."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.rpc import generation_pb2

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*_pb2*.py*")}


def test_committed_stubs_are_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="the generator is in the dev extra")
    if not shutil.which("protoc-gen-mypy", path=BIN):
        pytest.skip("protoc-gen-mypy is not installed; it is in the dev extra")
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", "--output", tmp_path], check=True)
    assert _texts(ROOT / "cluster" / "rpc") == _texts(tmp_path), "run `make proto` and commit what it writes"


def test_names_on_the_wire_are_those_of_the_proto_files() -> None:
    assert generation_pb2.DESCRIPTOR.name == "moesaic/v1/generation.proto"
    assert generation_pb2.GenerateRequest.DESCRIPTOR.full_name == "moesaic.v1.GenerateRequest"


def test_messages_can_be_pickled() -> None:
    message = generation_pb2.GenerateRequest(model="m")
    assert pickle.loads(pickle.dumps(message)) == message
