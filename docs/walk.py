"""The walk of one request, by a profile: which of our files it enters, and how many Python calls it takes.

Front end, attention worker and experts are those of a server, put together in one process without Ray: HTTP over an
in-process transport, the engine in its own thread, the embedded demo model, all experts in memory, default policies.
`sys.setprofile` counts calls of functions whose file is in cluster/ or actors/; nothing is timed.

    python docs/walk.py               the table
    python docs/walk.py --markdown    writes docs/measured/walk.md and walk.json
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import platform
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
_OURS = (f"{ROOT}/cluster/", f"{ROOT}/actors/")
_LAYER = "actors/model/seams.py", "_experts"  # transformers calls it once for each MoE layer of a step
_MEMORY = "actors/experts/memory/"
_START_DEADLINE_S = 120.0
_TOKENS = 64
_PROMPT = "Tell me a story about a lighthouse keeper and the sea."


class Walk:
    """Counts calls while it is on. One for all threads; `watch` is their profile function."""

    def __init__(self) -> None:
        self.is_on = False
        self.calls: Counter[str] = Counter()
        self.engine_calls = 0
        self.layer_calls: Counter[str] = Counter()
        self.layer_changes = 0
        self.num_layers = 0
        self.engine = 0  # the thread that steps
        self._depth: dict[int, int] = {}  # by thread: our frames inside a MoE layer
        self._file: dict[int, str] = {}  # by thread: the last of our files inside a MoE layer

    def watch(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function."""
        if not self.is_on or event not in ("call", "return"):
            return
        path = frame.f_code.co_filename
        if not path.startswith(_OURS):
            return
        file, thread = path[len(str(ROOT)) + 1 :], threading.get_ident()
        depth = self._depth.get(thread, 0)
        if event == "call":
            self.calls[file] += 1
            self.engine_calls += thread == self.engine
            if depth or (file, frame.f_code.co_name) == _LAYER:
                self._enter(thread, file, depth)
        elif depth:
            self._depth[thread] = depth - 1
            caller = frame.f_back.f_code.co_filename if frame.f_back else ""
            if depth > 1 and caller.startswith(_OURS):
                self._change(thread, caller[len(str(ROOT)) + 1 :])

    def _enter(self, thread: int, file: str, depth: int) -> None:
        if not depth:
            self.num_layers += 1
            self._file[thread] = file
        self._depth[thread] = depth + 1
        self.layer_calls[file] += 1
        self._change(thread, file)

    def _change(self, thread: int, file: str) -> None:
        self.layer_changes += self._file[thread] != file
        self._file[thread] = file


def measure(*, num_tokens: int = _TOKENS) -> dict[str, Any]:
    """Figures of a streamed chat of `num_tokens` tokens, after another one that warmed everything up."""
    walk = Walk()
    threading.setprofile(walk.watch)
    sys.setprofile(walk.watch)
    try:
        return asyncio.run(_measure(walk, num_tokens))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # None is allowed


async def _measure(walk: Walk, num_tokens: int) -> dict[str, Any]:
    from actors.attention.worker import AttentionWorker
    from cluster.config.load import load_config
    from cluster.frontend.build import build_front_end
    from cluster.model.info import read_model_info
    from cluster.stats.memory_store import MemoryStore

    config = load_config(None, {"attention": {"threads": 1}})
    info = read_model_info(config.model)
    worker = AttentionWorker(config, info, MemoryStore())
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_ready() -> None:
        walk.engine = threading.get_ident()
        loop.call_soon_threadsafe(ready.set)

    worker.start(on_ready)
    try:
        async with asyncio.timeout(_START_DEADLINE_S):
            await ready.wait()
        _, app = build_front_end(config, info, worker)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://walk", timeout=60.0) as client:
            await _chat(client, num_tokens)
            walk.is_on = True
            short = await _seen(walk, client, num_tokens // 2)
            long = await _seen(walk, client, num_tokens)
            walk.is_on = False
    finally:
        worker.stop()
    return _figures(walk, short, long)


@dataclass(frozen=True)
class Seen:
    """What one answer took: its tokens, calls by file, calls of the engine's thread, MoE layers computed."""

    num_tokens: int
    calls: Counter[str]
    engine_calls: int
    num_layers: int


async def _seen(walk: Walk, client: httpx.AsyncClient, num_tokens: int) -> Seen:
    calls, engine_calls, num_layers = Counter(walk.calls), walk.engine_calls, walk.num_layers
    count = await _chat(client, num_tokens)
    return Seen(count, walk.calls - calls, walk.engine_calls - engine_calls, walk.num_layers - num_layers)


async def _chat(client: httpx.AsyncClient, num_tokens: int) -> int:
    """Streams one answer of exactly so many tokens; how many chunks with text came."""
    body = {
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    used = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                used = int(usage["completion_tokens"])
    if used != num_tokens:
        raise SystemExit(f"the answer has {used} tokens, not the {num_tokens} asked for: nothing can be said per token")
    return used


def _figures(walk: Walk, short: Seen, long: Seen) -> dict[str, Any]:
    """Calls per token are the difference of two answers: what a request costs once falls out."""
    files = sorted(walk.calls)
    more_tokens, more_layers = long.num_tokens - short.num_tokens, long.num_layers - short.num_layers
    rooms = Counter("/".join(file.split("/")[:2]) for file in files)
    layers = walk.num_layers
    memory = sum(count for file, count in walk.layer_calls.items() if file.startswith(_MEMORY))
    return {
        "files": len(files),
        "files_in_a_layer": len(walk.layer_calls),
        "calls_per_token": round((long.calls.total() - short.calls.total()) / more_tokens, 1),
        "engine_calls_per_layer": round((long.engine_calls - short.engine_calls) / more_layers, 1),
        "calls_per_layer": round(sum(walk.layer_calls.values()) / layers, 1),
        "memory_calls_per_layer": round(memory / layers, 1),
        "changes_per_layer": round(walk.layer_changes / layers, 1),
        "layers_seen": layers,
        "files_by_room": dict(sorted(rooms.items())),
        "calls_per_layer_by_file": {
            file: round(count / layers, 2) for file, count in walk.layer_calls.most_common() if count / layers >= 0.05
        },
    }


_ROWS = {
    "files": "distinct files of ours that a request enters",
    "files_in_a_layer": "distinct files of ours in a MoE layer's experts",
    "calls_per_token": "Python calls of ours per token, front end included",
    "engine_calls_per_layer": "Python calls of ours per token and layer of the model, in the engine's thread",
    "calls_per_layer": "of these in the layer's experts",
    "memory_calls_per_layer": "of these again in expert memory",
    "changes_per_layer": "changes between files in a layer's experts",
}


def _table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ("---",) * len(header), *rows)]


def report(figures: dict[str, Any], earlier: dict[str, Any] | None) -> str:
    """The figures as Markdown. Args: earlier: those of another commit, to stand beside."""
    head = ("what", f"before ({earlier['commit']})", "now") if earlier else ("what", "now")
    rows = [(text, *([earlier["figures"][name]] if earlier else []), figures[name]) for name, text in _ROWS.items()]
    by_file = list(figures["calls_per_layer_by_file"].items())[:15]
    lines = [
        "# The walk of one request",
        "",
        "One streamed chat, from the HTTP request to its last token, in one process: the front end, the worker's "
        "engine and its experts, all of which are in memory; the demo model, default policies, one sequence. Between "
        "processes come the token stream and Ray's handle besides. Calls of Python functions in `cluster/` and "
        "`actors/` are counted, nothing is timed; per token is the difference of two answers. The experts of a layer "
        "are one call by transformers, in prefill and decode steps alike.",
        "",
        *_table(head, rows),
        "",
        "Where the calls of a layer are:",
        "",
        *_table(("file", "calls a layer"), [(f"`{file}`", count) for file, count in by_file]),
        "",
        "Files entered, by room:",
        "",
        *_table(("room", "files"), [(f"`{room}`", count) for room, count in figures["files_by_room"].items()]),
        "",
        f"Commit {_commit()}, {datetime.date.today().isoformat()}, Python {platform.python_version()}; written by "
        f"`python docs/walk.py --markdown`, raw numbers in `walk.json`.",
        "",
    ]
    return "\n".join(lines)


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    return run.stdout.strip() or "unknown"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--markdown", action="store_true", help="write docs/measured/walk.md and walk.json")
    parser.add_argument("--before", action="store_true", help="with --markdown: later walks are compared with this one")
    arguments = parser.parse_args()
    figures = measure()
    target = ROOT / "docs" / "measured"
    kept = target / "walk.json"
    earlier = json.loads(kept.read_text()).get("before") if kept.is_file() else None
    if arguments.markdown:
        now = {"commit": _commit(), "figures": figures}
        earlier = now if arguments.before else earlier
        kept.write_text(json.dumps({"before": earlier, "now": now}, indent=1) + "\n")
        (target / "walk.md").write_text(report(figures, earlier))
    print(json.dumps(figures) if arguments.json else report(figures, earlier))


if __name__ == "__main__":
    main()
