"""Prompts of benchmarks: the shared ones when they are beside the repository, else those bundled with the load tool."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.shared.models import REPOSITORY

SHARED_PROMPTS = REPOSITORY.parent / "shared" / "data" / "prompts"


def entries_of(file: Path) -> list[dict[str, str]]:
    """The lines of one file of prompts."""
    return [json.loads(line) for line in file.read_text().rstrip("\n").split("\n")]


def prompts_of(domain: str) -> list[str]:
    """The shared prompts of a domain."""
    file = SHARED_PROMPTS / f"{domain}.jsonl"
    if not file.is_file():
        raise SystemExit(f"{file} is not there; this benchmark needs the shared prompts")
    return [entry["prompt"] for entry in entries_of(file)]


def prompts_of_domains(num: int) -> list[str]:
    """`num` prompts, domain after domain: the shared ones when they are there, else the bundled ones."""
    if SHARED_PROMPTS.is_dir():
        files = sorted(SHARED_PROMPTS.glob("*.jsonl"))
        per_domain = [[entry["prompt"] for entry in entries_of(file)[:num]] for file in files]
        mixed = [domain[i] for i in range(num) for domain in per_domain if i < len(domain)]
        return mixed[:num]
    from cluster.loadgen.prompts import BUNDLED_PROMPTS

    return [BUNDLED_PROMPTS[i % len(BUNDLED_PROMPTS)] for i in range(num)]
