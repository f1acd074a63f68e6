"""Generate `cluster/rpc/` from `proto/moesaic/v1/*.proto`: `make proto`. Needs the `dev` extra.

The names in the descriptors stay those of the `.proto` files (`moesaic/v1/...`), as reflection and other languages
know them; only the Python module names are rewritten, because no package `moesaic` exists.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

PROTO = Path(__file__).resolve().parent
OUTPUT = PROTO.parent / "cluster" / "rpc"

_SOURCES = "moesaic/v1"
_FLAGS = ("python_out", "mypy_out", "grpc_python_out", "mypy_grpc_out")


def generate(output: Path) -> None:
    """Write modules and type stubs of every `.proto` file into `output`, and remove those of files that are gone.

    Raises:
        RuntimeError: the compiler refused a file; it has said why on stderr.
    """
    from grpc_tools import protoc

    # The compiler looks its plugins up on PATH; they lie beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    includes = (f"-I{PROTO}", f"-I{resources.files('grpc_tools') / '_proto'}")
    sources = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.glob(f"{_SOURCES}/*.proto"))
    with tempfile.TemporaryDirectory() as work:
        outputs = (f"--{flag}={'quiet:' if 'mypy' in flag else ''}{work}" for flag in _FLAGS)
        code = protoc.main(["protoc", *includes, *outputs, *sources])
        if code != 0:
            raise RuntimeError(f"protoc ended with {code}")
        texts = {path.name: _with_our_modules(path.read_text()) for path in (Path(work) / _SOURCES).iterdir()}
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob("*_pb2*.py*"):
        stale.unlink()
    for name, text in texts.items():
        (output / name).write_text(text)


def _with_our_modules(text: str) -> str:
    """Imports of generated modules, and the module that messages say they are of (pickle reads it)."""
    text = text.replace("from moesaic.v1 import", "from cluster.rpc import")
    return re.sub(r"'moesaic\.v1\.(\w+_pb2)'", r"'cluster.rpc.\1'", text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    generate(parser.parse_args().output)
