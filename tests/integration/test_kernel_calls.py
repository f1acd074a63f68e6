"""Every compiled kernel is really called in a live forward of the families it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from identity import engine_parts, generate, random_cases
from model_builders import FAMILIES, build_checkpoint

from actors.kernels.native import NativeKernels
from actors.kernels.sampling import SamplingKernel
from actors.kernels.search import SearchKernels
from cluster.model.info import load_model_info
from cluster.types import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NUM_STEPS = 6
KERNELS = (NativeKernels, SearchKernels, SamplingKernel)
OF_ALL = {
    "append_kv", "combine", "count_choices", "draw", "experts_ffn", "follow", "gate_form", "group", "learn", "linear",
    "pack_step", "paged_attention", "read_gate", "rms_norm", "rope",
}  # fmt: skip
LATENT = (OF_ALL | {"latent_attention"}) - {"paged_attention", "rope"}  # pairs of dimensions turn, not halves
OF_FAMILY = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gpt_oss": OF_ALL - {"rope"},  # cosines of half the dimensions
    "phimoe": OF_ALL - {"rms_norm"},  # layer norms
}
NOT_OF_A_FORWARD = {"read_bandwidth", "weights"}  # a benchmark's; for who checks the draw


def _names(kernels: type) -> list[str]:
    return [name for name, member in vars(kernels).items() if callable(member) and not name.startswith("_")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was called; calibration finds compiled linear layers faster, whatever the machine does."""
    counts: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **fields: Any) -> Any:
            counts[name] += 1
            return kernel(*args, **fields)

        return call

    for kernels in KERNELS:
        for name in _names(kernels):
            monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    monkeypatch.setattr("actors.model.fast_modules.best_time", lambda _: 1.0)
    return counts


def test_the_table_names_every_kernel() -> None:
    named = OF_ALL.union(NOT_OF_A_FORWARD, *OF_FAMILY.values())

    assert named == {name for kernels in KERNELS for name in _names(kernels)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_kernels_of_a_family_are_called_in_a_live_forward(tmp_path: Path, family: str, calls: Counter[str]) -> None:
    path = build_checkpoint(tmp_path, family)
    cases = random_cases(3, vocab_size=load_model_info(str(path)).vocab_size, max_tokens=NUM_STEPS)
    params = [SamplingParams(max_tokens=NUM_STEPS, temperature=0.8, top_p=0.9, seed=i) for i in range(3)]
    with engine_parts(path, cache="40%") as parts:
        calls.clear()

        generate(parts.engine, cases, params)

    assert set(calls) == OF_FAMILY.get(family, OF_ALL)
    num_layers = len(parts.layout.layers) + (family in ("deepseek_v2", "deepseek_v3"))  # and one without experts
    assert calls["append_kv"] == NUM_STEPS * num_layers
    assert calls["rope"] in (0, 2 * NUM_STEPS * num_layers)
    assert calls["draw"] == NUM_STEPS
