"""Write `docs/sizing.md`, worked examples of `moesaic fit`: `python docs/sizing.py`; `--check` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "sizing.md"
CONFIGS = ROOT / "tests" / "data" / "configs"
_CASES = (("Mixtral-8x7B-v0.1", 32), ("Mixtral-8x7B-v0.1", 64), ("Mixtral-8x7B-v0.1", 96), ("Qwen3-30B-A3B", 64))
_HEAD = """# Will it fit?

<!-- Written by `python docs/sizing.py`; change what it reads, not this page. -->

`moesaic fit MODEL --nodes 2 --memory 64GiB` answers from the model's `config.json` alone: a local folder, an embedded
model, or a hub id, of which nothing else is fetched. `--workers`, `--hosts`, `--dtype` and `--max-model-len` change the
question. It ends with 1 where the model does not fit, and says the number and the way out.

## What takes memory

| process | takes |
|---|---|
| attention worker | all dense weights, its KV cache, and without hosts the expert cache (`experts.cache`) |
| expert host | the experts that it owns (`experts.host_cache`) |

70% of a node's memory are planned for, as the server itself does; the rest is for the processes themselves, activations
and other programs. A slower RAM tier below the expert cache is not counted: the cache is RAM already, so the tier only
makes sense where a slower memory is emulated. Experts that do not fit are read from disk when a token needs them: that
is slower and changes no answer.

## host_cache

`experts.host_cache` is how many bytes of experts one expert host holds. `auto` is room for the experts that it owns and
an eighth more: the eighth is where copies of busy experts go, and what comes before something else may leave. A size
(`20GiB`) or a share of all routed experts (`40%`) overrides it. Less than it owns is allowed, down to one token's
experts of a layer: the host then reads the others from disk when they are asked for.

## Worked examples: two nodes, one worker, one expert host on each node

Whole context, weights in bfloat16 as published.

"""


def page() -> str:
    """The text of the page."""
    from actors.model.shape import read_shape
    from cluster.model.info import read_sizes
    from cluster.model.sizing import Machines, fit, in_gib

    head = (
        "model",
        "memory of a node",
        "dense weights",
        "KV cache",
        "all experts",
        "each host holds",
        "in memory",
        "set",
    )
    rows = [head, ("---",) * len(head)]
    for name, gib in _CASES:
        shape = read_shape(read_sizes(str(CONFIGS / name)), "auto")
        sizing = fit(shape, Machines(nodes=2, node_bytes=gib * 2**30, workers=1, hosts=2))
        settings = ", ".join(f"`{key}: {value}`" for key, value in sizing.settings)
        sizes = map(in_gib, (sizing.dense_bytes, sizing.kv_bytes, shape.all_experts_bytes, sizing.host_bytes))
        rows.append((name, f"{gib} GiB", *sizes, f"{100 * sizing.resident_share:.0f}%", settings))
    return _HEAD + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where the page is out of date")
    if parser.parse_args().check:
        sys.exit(PAGE.read_text() != page())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
