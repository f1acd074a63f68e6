"""`cluster/rpc/` is what `make proto` writes today, and the messages can live beside those of other programs."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from papers import DOCS, Page

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


def test_a_client_elsewhere_makes_its_stubs_with_the_documented_command(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="the generator is in the dev extra")
    commands = [words for words in Page(DOCS / "operating.md").command_lines() if "grpc_tools.protoc" in words]
    ((python, *words),) = commands
    words = [str(ROOT / "proto") if word == "../moesaic/proto" else word for word in words]
    assert python == "python" and str(ROOT / "proto") in words

    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)

    code = (
        "from moesaic.v1 import generation_pb2 as pb, generation_pb2_grpc, cluster_pb2_grpc;"
        "print(pb.__file__, pb.GenerateRequest(model='m').model)"
    )
    client = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert client.stdout.split() == [str(tmp_path / "moesaic/v1/generation_pb2.py"), "m"]


def test_names_on_the_wire_are_those_of_the_proto_files() -> None:
    assert generation_pb2.DESCRIPTOR.name == "moesaic/v1/generation.proto"
    assert generation_pb2.GenerateRequest.DESCRIPTOR.full_name == "moesaic.v1.GenerateRequest"


def test_messages_can_be_pickled() -> None:
    message = generation_pb2.GenerateRequest(model="m")
    assert pickle.loads(pickle.dumps(message)) == message
