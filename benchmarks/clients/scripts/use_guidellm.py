"""GuideLLM: a small benchmark of completions and one of chat; every request must succeed, with all its tokens.

use_guidellm.py URL MODEL FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_REQUESTS, _TOKENS = 8, 12


def main(url: str, model: str, folder: str) -> None:
    """Raises AssertionError if a request failed."""
    said = [_run(url, model, folder, path) for path in ("/v1/completions", "/v1/chat/completions")]
    print("; ".join(said))


def _run(url: str, model: str, folder: str, path: str) -> str:
    with tempfile.TemporaryDirectory() as out:
        file = Path(out, "report.json")
        command = [
            *(str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={url},request_format={path},model={model}"),
            *("--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={_REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={folder}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=48,output_tokens={_TOKENS}"),
            *("--output", f"kind=json,path={file}"),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (benchmark,) = json.loads(file.read_text())["benchmarks"]
    requests = benchmark["requests"]
    errors = [request.get("info", {}).get("error") for request in requests["errored"]]
    assert len(requests["successful"]) == _REQUESTS, f"{path}: {len(errors)} failed: {errors[:1]}"
    tokens = {request["output_metrics"]["text_tokens"] for request in requests["successful"]}
    assert tokens == {_TOKENS}, f"{path}: tokens {tokens}"
    return f"{path}: {_REQUESTS} of {_REQUESTS}"


if __name__ == "__main__":
    main(*sys.argv[1:])
