"""The author's sampling and the tokenizer's end, through an engine in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from cluster.app import local_service
from cluster.config.load import from_tree
from cluster.frontend.generation.sequence import SamplingOptions, TextChunk
from cluster.frontend.generation.service import GenerationService
from cluster.model.info import load_model_info
from cluster.types import FinishReason

CHAT = ({"role": "user", "content": "What is 12 + 30?"},)


def _model(path: Path) -> Path:
    """The demo model with a sampling author, whose only end is the tokenizer's."""
    demo = load_model_info("moesaic-demo").path
    for file in demo.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (path / file.name).symlink_to(file)
    config = json.loads((demo / "config.json").read_text())
    del config["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 48}))
    return path


def _service(path: Path, generation_config: str) -> GenerationService:
    model = {"path": str(path), "max_model_len": 128, "generation_config": generation_config}
    return local_service(from_tree({"model": model, "attention": {"kv_cache": "16MiB", "threads": 1}}))


def _answer(service: GenerationService, name: str, **asked: Any) -> list[TextChunk]:
    async def collect() -> list[TextChunk]:
        prompt = await service.encode_chat(CHAT)
        return [chunk async for chunk in service.generate(prompt, SamplingOptions(**asked), name)]

    return asyncio.run(collect())


def test_a_silent_request_samples_and_stops_as_the_files_say(tmp_path: Path) -> None:
    path = _model(tmp_path)
    service = _service(path, "auto")
    silent, greedy = _answer(service, "silent"), _answer(service, "greedy", temperature=0.0)
    texts = ["".join(chunk.text for chunk in chunks) for chunks in (silent, greedy)]
    assert texts[0] == texts[1]
    assert (silent[-1].finish_reason, silent[-1].usage.completion_tokens) == (FinishReason.LENGTH, 48)

    (end,) = load_model_info(str(path)).eos_token_ids
    (ended,) = _answer(service, "ended", logit_bias=((end, 100.0),))
    assert (ended.finish_reason, ended.token_ids, ended.text) == (FinishReason.STOP, (end,), "")

    plain = _service(path, "none")
    drawn = {"".join(chunk.text for chunk in _answer(plain, f"hot-{seed}", seed=seed)) for seed in range(4)}
    assert len(drawn) > 1, "temperature 1 drew the same text four times"
