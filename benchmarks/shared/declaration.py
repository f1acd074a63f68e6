"""What a topic's `__init__` says of a benchmark. Light to import: the list of all is shown without torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One measurement with a name.

    module: has `run(options) -> Report` and, where it takes options of its own, `add_options(parser)`.
    description: one line. targets: what is promised, in words; the numbers stand in the module and on the page.
    meaning: two sentences for the page: how to read the numbers, and what follows from them.
    in_make_bench: `make bench` runs its quick form.
    has_own_command: the module has a `main()` that reads the command line and writes a page of its own form.
    """

    name: str
    module: str
    description: str
    targets: str
    meaning: str
    in_make_bench: bool = True
    has_own_command: bool = False

    @property
    def page(self) -> str:
        """The name of its page in docs/measured, without ending."""
        return self.name.replace("_", "-")

    def load(self) -> ModuleType:
        """Import the module. Takes seconds: torch and Ray come with most of them."""
        return importlib.import_module(self.module)
