"""Where the repository and the models of benchmarks are."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.shared.command_line import progress

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "models" / "moesaic-demo"


def cache_folder() -> Path:
    """What benchmarks keep between runs; made if it is not there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moesaic"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wide_model(factor: int) -> Path:
    """A function-preserving copy of the demo model whose experts are `factor` times as large (made once)."""
    target = cache_folder() / f"moesaic-demo-{factor}x"
    if not target.is_dir():
        from actors.convert.widen import widen_checkpoint

        progress(f"writing {target}")
        widen_checkpoint(DEMO, target, factor=factor)
    return target
