"""An engine in this process whose experts are all resident, and prompts that it decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.attention.build import build_engine
from actors.engine.engine import StepOutput
from actors.engine.loaded_engine import LoadedEngine
from cluster.config.load import load_config
from cluster.model.info import load_model_info
from cluster.types import GenerationRequest, RequestId, SamplingParams


def resident_engine(path: Path) -> LoadedEngine:
    """bfloat16, room for every expert, one thread."""
    config = load_config(None, {"model": {"path": str(path), "dtype": "bfloat16"}, "experts": {"cache": "100%"}})
    return build_engine(config, load_model_info(str(path)), threads=1)


def begin_all(parts: LoadedEngine, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[StepOutput]:
    """Give the engine all prompts and step until each has its first token; `num_tokens` of each are to come then.

    Returns:
        what the steps put out.
    """
    sampling = SamplingParams(max_tokens=num_tokens + 1, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        parts.engine.add(GenerationRequest(request_id=RequestId(str(i)), prompt_ids=tuple(prompt), sampling=sampling))
    outputs: list[StepOutput] = []
    while len(outputs) < len(prompts):
        outputs += parts.engine.step()
    return outputs
