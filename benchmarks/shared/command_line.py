"""What every benchmark's command line has."""

from __future__ import annotations

import argparse
import sys


def arguments(description: str, *, program: str | None = None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark takes. Args: program: the command, as usage texts show it."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--quick", action="store_true", help="the same work, smaller: under three minutes")
    return parser


def progress(line: str) -> None:
    """A line for a person who waits; goes to standard error."""
    print(line, file=sys.stderr, flush=True)
