"""What load requests say: prompts of many domains, from a file or bundled, cut or repeated to a length.

Knows text; knows a tokenizer only as the two functions it is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

from cluster.errors import InvalidRequest

BUNDLED_PROMPTS: tuple[str, ...] = (
    # Python
    'def read_lines(path):\n    """Return the lines of a text file without line ends."""\n',
    "import collections\n\nclass LruCache:\n    def __init__(self, capacity):\n        self.capacity = capacity\n",
    # C
    "#include <stdio.h>\n#include <stdlib.h>\n\nstatic int compare(const void *a, const void *b)\n{\n",
    "/* Append a node to the end of a singly linked list. */\nstruct node *append(struct node *head, int value)\n{\n",
    # JavaScript and TypeScript
    "export async function fetchJson(url: string): Promise<unknown> {\n  const response = await fetch(url);\n",
    "const express = require('express');\nconst app = express();\n\napp.get('/users/:id', (req, res) => {\n",
    # Shell and SQL
    "#!/bin/sh\n# Remove log files older than seven days.\nset -eu\n",
    "SELECT customers.name, SUM(orders.total) AS revenue\nFROM customers\nJOIN orders ON",
    # English fiction
    "The old lighthouse keeper climbed the stairs for the last time that winter, and when he reached the lamp",
    '"You should not have come back," she said, closing the door against the rain. He looked at',
    # French
    "Il était une fois, dans un petit village au bord de la mer, une jeune fille qui",
    "La réunion du conseil municipal a commencé à neuf heures. Le maire a d'abord présenté",
    # German
    "Am nächsten Morgen ging er durch den Wald, in dem der Schnee noch lag, und dachte an",
    "Die Verwaltung hat beschlossen, dass die neuen Regeln für alle Einwohner der Stadt",
    # Spanish
    "En el centro de la ciudad había un mercado donde los vendedores gritaban los precios de",
    "El niño miró por la ventana y vio que el tren ya había salido de la estación, así que",
    # Biomedical
    "Background: We studied the effect of early antibiotic treatment on mortality in patients with severe",
    "The protein binds to the receptor on the surface of the cell and inhibits the expression of",
    # Licences and law
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and",
    "The licensee shall not assign or transfer this agreement without the prior written consent of",
    # Configuration and Unix documentation
    "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: web\nspec:\n  replicas: 3\n",
    "NAME\n    grep - print lines that match patterns\n\nSYNOPSIS\n    grep [OPTION]... PATTERNS [FILE]...\n",
    # Arithmetic and dialogue
    "Question: A baker sells 24 rolls in the morning and twice as many in the afternoon. How many in all?\nAnswer:",
    "Question: What should I look at first when my computer does not start?\nAnswer:",
)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The field `prompt` of every line of a JSONL file.

    Raises:
        InvalidRequest: unreadable, not JSON, or without that field; names file and line.
    """
    prompts: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut JSON strings at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"prompts {path}: {error}", param="prompts") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: object = json.loads(line)
        except ValueError as error:
            raise InvalidRequest(f"prompts {path}, line {number}: {error}", param="prompts") from error
        prompt = cast("dict[str, Any]", row).get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise InvalidRequest(f"prompts {path}, line {number}: no text in field 'prompt'", param="prompts")
        prompts.append(prompt)
    if not prompts:
        raise InvalidRequest(f"prompts {path}: the file is empty", param="prompts")
    return tuple(prompts)


def take_prompts(prompts: Sequence[str], num_requests: int) -> list[str]:
    """That many prompts in order, from the start again when they run out."""
    return list(islice(cycle(prompts), num_requests))


def fit_prompt(
    prompt: str, num_tokens: int, *, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> str:
    """`prompt` cut, or repeated and then cut, to `num_tokens` tokens (to within one where texts join)."""
    ids = list(encode(prompt))
    return decode(list(islice(cycle(ids), num_tokens))) if ids else prompt


def fit_prompt_by_words(prompt: str, num_tokens: int, *, tokens_per_word: float = 1.5) -> str:
    """Like `fit_prompt` where no tokenizer is at hand: an estimate, the report has the true counts."""
    words = prompt.split()
    return " ".join(islice(cycle(words), max(1, round(num_tokens / tokens_per_word)))) if words else prompt
