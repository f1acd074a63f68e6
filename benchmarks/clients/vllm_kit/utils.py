"""Stands in for vLLM's `tests/utils.py`: the server that its entry-point tests ask is Moesaic.

Copied beside the tests by `benchmarks/clients/vllm_entrypoints.py`. Servers are shared: modules that ask for the same
settings get the same process, one at a time, as starting one takes longer than most tests.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import openai

MODEL = (
    "moesaic-demo"  # a folder of that name beside the tests: the demonstration model, greedy where a request is silent
)
MODEL_LENGTH = 2048
_MAX_QUEUE = 256  # vLLM queues without a bound
_READY_S = 300.0
_STOP_S = 60.0

# A flag of vLLM, and the flags and settings of ours that say the same. None: says nothing about answers (a device's
# memory, kernels, an adapter whose tests are left out, what we always do).
_WITH_VALUE: dict[str, str | None] = {
    "--dtype": "--dtype",
    "--max-model-len": "--max-model-len",
    "--api-key": "--api-key",
    "--max-num-seqs": "attention.max_running",
    "--max-logprobs": "frontend.max_logprobs",
    "--root-path": "frontend.root_path",
    "--max-num-batched-tokens": None,
    "--gpu-memory-utilization": None,
    "--port": None,
    "--lora-modules": None,
    "--max-lora-rank": None,
    "--max-cpu-loras": None,
    "--runner": None,
    "--limit-mm-per-prompt": None,
    "--tool-call-parser": None,
    "--load-format": None,
}
_WITHOUT_VALUE: dict[str, str | None] = {
    "--return-tokens-as-token-ids": "frontend.return_tokens_as_token_ids",
    "--enable-force-include-usage": "frontend.force_include_usage",
    "--enable-server-load-tracking": None,
    "--enable-per-request-metrics": "frontend.per_request_metrics",
    "--enable-request-id-headers": None,
    "--enable-tokenizer-info-endpoint": None,
    "--enable-prompt-tokens-details": None,
    "--no-enable-prefix-caching": None,
    "--enable-chunked-prefill": None,
    "--enforce-eager": None,
    "--enable-lora": None,
    "--enable-auto-tool-choice": None,
    "--trust-remote-code": None,
    "--skip-tokenizer-init": None,
}


def translated(arguments: list[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The flags and settings of Moesaic that say what vLLM's flags say.

    Raises:
        ValueError: a flag that is not known here.
    """
    flags: dict[str, str] = {}
    settings: dict[str, str] = {}
    left = list(arguments)
    while left:
        flag = left.pop(0)
        if flag in _WITHOUT_VALUE:
            name, value = _WITHOUT_VALUE[flag], "true"
        elif flag in _WITH_VALUE:
            name, value = _WITH_VALUE[flag], left.pop(0)
        else:
            raise ValueError(f"flag {flag} of vLLM is not translated")
        if name is None:
            continue
        if flag == "--max-model-len":
            value = str(min(int(value), MODEL_LENGTH))
        if flag == "--dtype":
            value = "float32"  # what the small model answers is sure in it
        (flags if name.startswith("--") else settings)[name] = value
    if key := environment.get("VLLM_API_KEY"):
        flags["--api-key"] = key
    as_list = [word for pair in sorted(flags.items()) for word in pair]
    return as_list, {f"MOESAIC__{name.upper().replace('.', '__')}": value for name, value in sorted(settings.items())}


class _Process:
    """A `moesaic serve` under way."""

    def __init__(self, flags: list[str], settings: dict[str, str]) -> None:
        self.said = (tuple(flags), tuple(settings.items()))
        self.port = _free_port()
        self.root = tempfile.mkdtemp(prefix="mv-")
        command = [os.environ["MOESAIC_COMMAND"], "serve", MODEL, "--port", str(self.port), "--no-grpc"]
        command += ["--threads", "1", "--max-queue", str(_MAX_QUEUE), *flags]
        environment = {**os.environ, **settings, "RAY_TMPDIR": self.root}
        with Path(self.root, "log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline_s = time.monotonic() + _READY_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                tail = Path(self.root, "log").read_text(errors="replace")[-2000:]
                self.stop()
                raise RuntimeError(f"{' '.join(command)} with {settings}: not ready\n{tail}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End it, as Ctrl-C does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def _ready(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/ready", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


_current: list[_Process] = []


def stop_servers() -> None:
    """End the server that is under way; called at the end of the session."""
    while _current:
        _current.pop().stop()


class RemoteOpenAIServer:
    """The part of vLLM's class that the tests use."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(self, model: str, vllm_serve_args: list[str], *, env_dict: dict[str, str] | None = None, **_: Any):
        flags, settings = translated(vllm_serve_args, env_dict or {})
        if not _current or _current[0].said != (tuple(flags), tuple(settings.items())):
            stop_servers()
            _current.append(_Process(flags, settings))
        self.host, self.port = "127.0.0.1", _current[0].port

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        """The next module may want the same server."""

    @property
    def url_root(self) -> str:
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        return self.url_root + "/" + re.sub("^/", "", "/".join(parts))

    def get_client(self, **kwargs: Any) -> openai.OpenAI:
        kwargs.setdefault("timeout", 600)
        return openai.OpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **kwargs)

    def get_async_client(self, **kwargs: Any) -> openai.AsyncOpenAI:
        kwargs.setdefault("timeout", 600)
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key=self.DUMMY_API_KEY, max_retries=0, **kwargs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
