"""A small OpenAI-like server, and a way to run the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.main import app

WORKER = {
    "worker_id": "w0",
    "phase": "ready",
    "error": None,
    "model": "demo",
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "num_running": 2,
    "num_waiting": 1,
    "kv_blocks_total": 100,
    "kv_blocks_used": 7,
    "num_preemptions": 0,
    "generated_tokens": 5,
    "prompt_tokens": 6,
    "cached_prompt_tokens": 0,
    "degraded": ["statistics not shared"],
    "expert_memory": {
        "eviction": "moesaic",
        "prediction": "fmoe",
        "tiers": [
            {
                "tier": "device",
                "budget_bytes": 2**20,
                "resident_bytes": 2**19,
                "num_resident": 8,
                "bytes_moved": 0,
                "emulated": False,
            },
            {
                "tier": "ram",
                "budget_bytes": 2**22,
                "resident_bytes": 2**21,
                "num_resident": 32,
                "bytes_moved": 3 * 2**20,
                "emulated": True,
            },
            {
                "tier": "disk",
                "budget_bytes": None,
                "resident_bytes": 0,
                "num_resident": 0,
                "bytes_moved": 0,
                "emulated": False,
            },
        ],
        "budget_bytes": 2**20,
        "resident_bytes": 2**19,
        "model_expert_bytes": 2**22,
        "num_experts": 64,
        "num_resident": 8,
        "hits": 90,
        "misses": 10,
        "misses_by_tier": {"ram": 7, "remote": 0, "disk": 3},
        "late": 2,
        "prefetch_used": 21,
        "prefetch_wasted": 4,
        "prefetch_dropped": 1,
        "prefetch_bytes": {"ram": 2**20, "remote": 0, "disk": 2**19},
        "bytes_read": 2**21,
        "stall_s": 0.25,
        "search_share": 0.034,
        "calibration": [
            {"predicted": 0.12, "observed": 0.09, "count": 100},
            {"predicted": 0.0, "observed": 0.0, "count": 0},
            {"predicted": 0.8, "observed": 0.75, "count": 4},
        ],
        "read_mode": "direct",
        "kernel": "native",
    },
}
ACTIVATIONS = {"prefill": [1] * 8, "decode": [0] * 8}
LAYER = {
    "layer": 0,
    "num_experts": 8,
    "resident": [0, 1, 2, 3],
    "activations": ACTIVATIONS,
    "hits": 3,
    "misses": 1,
}
CLUSTER = {"layers": [{"layer": 0, "activations": {"prefill": [3000] + [0] * 7, "decode": [1] * 8}}], "degraded": None}

SCHEDULER = {
    "uptime_s": 90.4,
    "routing": "semantic",
    "placement_mode": "auto",
    "workers": [{"worker_id": "w0"}],
    "hosts": [{"host_id": "host-0-1"}],
    "knowledge": {"version": 5, "num_clusters": 16, "age_s": 3.0, "mutual_information": 0.1234, "support": 900.0},
    "placement": {
        "epoch": 3,
        "num_plans": 7,
        "num_migrations": 2,
        "bytes_moved": 3 * 2**20,
        "balance": 1.25,
        "reason": "the hosts are level",
        "migration": "",
    },
    "drains": [{"node_id": "0123456789abcdef", "is_empty": False, "left": ["expert host 0: 12 experts"]}],
    "degraded": [],
}


@dataclass
class FakeServer:
    """What the server answers, and the bodies it was sent."""

    url: str = ""
    pages: dict[str, dict[str, Any]] = field(default_factory=dict)
    words: list[str] = field(default_factory=lambda: ["one", " two"])
    error: tuple[int, str] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def _handler(fake: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.headers.append(dict(self.headers))
            page = fake.pages.get(self.path)
            self._send(404 if page is None else 200, page or {"error": {"message": "no such page"}})

        def do_POST(self) -> None:
            fake.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if self.path in fake.pages and fake.error is None:
                self._send(200, fake.pages[self.path])
                return
            if fake.error is not None:
                self._send(fake.error[0], {"error": {"message": fake.error[1]}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            chat = "chat" in self.path
            events: list[dict[str, Any]] = [
                {"choices": [{"delta": {"content": word}} if chat else {"text": word}]} for word in fake.words
            ]
            events.append({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
            events.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(fake.words)}})
            for event in events:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def _send(self, code: int, page: dict[str, Any]) -> None:
            body = json.dumps(page).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer(
        pages={
            "/v1/models": {"data": [{"id": "demo"}]},
            "/status": {"workers": [WORKER], "draining": False},
            "/ready": {"status": "ready"},
            "/experts": {"workers": [{"id": "w0", "layers": [LAYER]}], "hosts": [], "cluster": CLUSTER},
            "/scheduler": SCHEDULER,
        }
    )
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, list(args), input=stdin)

    return invoke
