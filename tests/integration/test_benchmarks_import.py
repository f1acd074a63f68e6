"""Every benchmark that can be named can be imported, and takes the options that it says."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from benchmarks.catalog import BENCHMARKS


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_imported(name: str) -> None:
    benchmark = BENCHMARKS[name]
    module = benchmark.load()
    assert callable(module.main if benchmark.has_own_command else module.run)
    if hasattr(module, "add_options"):
        module.add_options(ArgumentParser())
