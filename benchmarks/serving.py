"""What HTTP costs: streaming of 8 concurrent requests against the engine's own throughput; and time to ready.

One server process tree and one engine in this process, both on one compute thread and the same wide model, measured
in turn within one run, warm. Rates are of the decode phase: tokens after everybody's first one.

    python benchmarks/serving.py [--quick] [--json] [--factor 32]
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from decode import _engine, _run_ours
from harness import Report, arguments, median, one_thread, progress, prompts_of_domains, wide_model
from transformers import AutoTokenizer

from cluster.loadgen.sse import event_text, read_events

CONCURRENCY = 8
MIN_SHARE = 0.85
MAX_READY_S = 25.0


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--factor", type=int, default=32)
    options = parser.parse_args()
    path = wide_model(options.factor)
    rounds, num_tokens = (3, 32) if options.quick else (5, 96)
    report = Report(f"Serving, {path.name}, bfloat16, {CONCURRENCY} concurrent streams, warm, {num_tokens} tokens each")
    port = _free_port()
    began = time.monotonic()
    server = subprocess.Popen(
        [
            Path(sys.executable).with_name("moesaic"),
            *("serve", str(path), "--port", str(port), "--grpc-port", str(_free_port()), "--threads", "1"),
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        ready_s = _wait_ready(server, port, began)
        progress(f"ready after {ready_s:.1f} s")
        with one_thread():
            _measure(report, path, port, rounds, num_tokens)
    finally:
        server.terminate()
        server.wait(timeout=60)
    report.at_most("start to ready, s", ready_s, MAX_READY_S)
    return report.finish(as_json=options.json)


def _measure(report: Report, path: Path, port: int, rounds: int, num_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text).input_ids[:32] for text in prompts_of_domains(CONCURRENCY)]
    parts = _engine(path)
    http: list[float] = []
    engine: list[float] = []
    for index in range(-1, rounds):
        through_http = asyncio.run(_stream_all(port, path.name, prompts, num_tokens))
        alone, _ = _run_ours(parts, prompts, num_tokens)
        progress(f"round {index + 1} of {rounds}: HTTP {through_http:.1f}, engine {alone:.1f} tok/s")
        if index >= 0:
            http.append(through_http)
            engine.append(alone)
    share = median([a / b for a, b in zip(http, engine, strict=True)])
    report.rows.append({"engine tok/s": median(engine), "HTTP tok/s": median(http), "share": share})
    report.at_least("HTTP streaming, share of the engine's own throughput", share, MIN_SHARE)


async def _stream_all(port: int, model: str, prompts: list[list[int]], num_tokens: int) -> float:
    """Decode tokens per second over all streams, from the time when the last one has its first token."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        started = [asyncio.Event() for _ in prompts]
        counted = [0] * len(prompts)

        async def stream(i: int) -> None:
            body = {"model": model, "prompt": prompts[i], "max_tokens": num_tokens + 1, "temperature": 0,
                    "ignore_eos": True, "stream": True, "logprobs": 0}  # fmt: skip
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for event in read_events(response.aiter_lines()):
                    choices = event.get("choices") or [{}]
                    tokens = len((choices[0].get("logprobs") or {}).get("tokens") or ())
                    counted[i] += tokens or (1 if event_text(event) else 0)
                    started[i].set()

        streams = [asyncio.create_task(stream(i)) for i in range(len(prompts))]
        await asyncio.gather(*(event.wait() for event in started))
        before, began = sum(counted), time.perf_counter()
        await asyncio.gather(*streams)
        total = len(prompts) * (num_tokens + 1)
        return (total - before) / (time.perf_counter() - began)


def _wait_ready(server: subprocess.Popen[bytes], port: int, began: float) -> float:
    while time.monotonic() - began < 180:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode} before it was ready")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200:
                return time.monotonic() - began
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit("not ready after 180 s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
