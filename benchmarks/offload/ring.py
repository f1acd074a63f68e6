"""The ring (MoESys) alone: time of long prompts with the ring, and with the same policies and the cache instead.

python -m benchmarks ring [--quick] [--json]
"""

from __future__ import annotations

import time
from argparse import Namespace
from unittest.mock import patch

from transformers import AutoTokenizer

from actors.experts import policy_runner as policy_runner
from benchmarks.offload.engine import engine, fill_ram
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import median
from benchmarks.shared.models import wide_model
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report
from cluster.model.info import load_model_info
from cluster.types import GenerationRequest, RequestId, SamplingParams

POLICY, CACHE, GB_PER_S, FACTOR = "moesaic+moesaic", 0.25, 1.0, 32


def run(options: Namespace) -> Report:
    """Measure."""
    num_prompts = 4 if options.quick else 12
    path = wide_model(FACTOR)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [tokenizer(text).input_ids[:200] for text in prompts_of_domains(num_prompts)]
    report = Report(f"Long prompts, {path.name}, cache {CACHE:.0%}, RAM full, emulated link {GB_PER_S:g} GB/s")
    times: dict[str, list[float]] = {}
    info = load_model_info(str(path), max_model_len=256)
    for name in ("ring", "cache"):
        ring_for_step = policy_runner.ring_for_step if name == "ring" else lambda *_: None
        with (
            patch.object(policy_runner, "ring_for_step", ring_for_step),
            engine(info, POLICY, cache=CACHE, link=GB_PER_S) as parts,
        ):
            fill_ram(parts)
            for i, prompt in enumerate(prompts):
                sampling = SamplingParams(max_tokens=1, temperature=0.0)
                parts.engine.add(
                    GenerationRequest(request_id=RequestId(str(i)), prompt_ids=tuple(prompt), sampling=sampling)
                )
                began_s = time.perf_counter()
                while parts.engine.has_work:
                    parts.engine.step()
                times.setdefault(name, []).append(time.perf_counter() - began_s)
            loads = sum(parts.store.counters.bytes_moved.values()) / parts.store.slot_bytes
            row = {"way": name, "median s": median(times[name][1:]), "loads": round(loads)}
            report.rows.append(row | {"stall s": parts.store.counters.total_stall_s})
            progress(f"{name}: {median(times[name][1:]):.3g} s a prompt")
    report.notes.append("the first prompt of each is left out: DEVICE was empty")
    return report
