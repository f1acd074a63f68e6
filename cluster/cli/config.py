"""`moesaic config`: the configuration as the server would have it, or an example to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.settings import SETTINGS

EXAMPLE = """\
model:
  path: moesaic-demo        # a folder, a hub id, or the embedded model
  max_model_len: 2048       # longest sequence in tokens; left out: the model's
attention:
  kv_cache: auto            # room for one whole sequence, at least 256MiB; or a size: 2GiB
  max_queue: 256            # requests that may wait; more are answered 429
experts:
  cache: auto               # memory for experts: all that fit; or 512MiB, or 25%
  hosts: 0                  # processes that own experts; 0: the worker computes them itself
  eviction: moesaic         # what leaves a full memory first
  prediction: moesaic       # what is fetched ahead of need
frontend:
  host: 127.0.0.1           # 0.0.0.0 listens on every address: set api_key then
  port: 8000
# Every key and its default: docs/config.md. Environment: MOESAIC__EXPERTS__CACHE=25%
"""


def config(
    file: Annotated[Path | None, typer.Option("--config", help=SETTINGS["config"].option.help)] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a commented file to start from.")] = False,
) -> None:
    """Print the configuration that the file, the environment and the defaults come to; secrets are not shown."""
    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    import yaml

    from cluster.config.load import load_config

    typer.echo(yaml.safe_dump(_without_secrets(load_config(file).model_dump(mode="json")), sort_keys=False), nl=False)


def _without_secrets(tree: dict[str, Any]) -> dict[str, Any]:
    """A Redis URL may hold a password; keys are hidden by their type already."""
    from urllib.parse import urlsplit, urlunsplit

    url = tree["redis"]["url"]
    if url is None:
        return tree
    parts = urlsplit(str(url))
    hidden = parts.netloc.rpartition("@")
    netloc = f"**********@{hidden[2]}" if hidden[1] else parts.netloc
    return {**tree, "redis": {**tree["redis"], "url": urlunsplit((*parts[:1], netloc, *parts[2:3], "", ""))}}
