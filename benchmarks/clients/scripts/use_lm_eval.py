"""lm-evaluation-harness, local-completions: log likelihoods of choices, and generated answers, of a task made here.

    use_lm_eval.py URL MODEL FOLDER

Its own tasks fetch their data from a hub; this one has ten sums in a file.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

_MOST_APART = 0.3  # bfloat16 on both sides, in batches of other shapes

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OPENAI_API_KEY="none")

_CHOICES = """
task: sums_choice
dataset_path: json
dataset_kwargs: {data_files: {test: "%(data)s"}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_GENERATE = """
task: sums_generate
dataset_path: json
dataset_kwargs: {data_files: {test: "%(data)s"}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def main(url: str, model: str, folder: str) -> None:
    """Raises AssertionError or the harness's own error."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = root / "sums.jsonl"
        rows = [
            {"question": f"What is {a} + {a + 3}?", "choices": [str(2 * a + 3), str(a), str(9 * a + 7)], "gold": 0}
            for a in range(2, 12)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "sums_choice.yaml").write_text(_CHOICES % {"data": data})
        (root / "sums_generate.yaml").write_text(_GENERATE % {"data": data})
        arguments = {
            "model": model,
            "base_url": f"{url}/v1/completions",
            "tokenizer": folder,
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "max_retries": 1,
            "tokenized_requests": False,
        }
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=arguments,
            tasks=["sums_choice", "sums_generate"],
            task_manager=TaskManager(include_path=name, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    accuracy = found["results"]["sums_choice"]["acc,none"]
    match = found["results"]["sums_generate"]["exact_match,none"]
    likelihoods = [response[0] for sample in found["samples"]["sums_choice"] for response in sample["filtered_resps"]]
    expected = [_likelihood(folder, row["question"], choice) for row in rows for choice in row["choices"]]
    assert len(likelihoods) == len(expected) == 30
    farthest = max(abs(float(a) - b) for a, b in zip(likelihoods, expected, strict=True))
    assert farthest < _MOST_APART, f"a log likelihood is {farthest:.3f} from transformers' own"
    print(
        f"30 log likelihoods (at most {farthest:.3f} from transformers'), 10 answers: right "
        f"(accuracy {accuracy:.1f}, exact match {match:.1f}: a small model)"
    )


@functools.cache
def _transformers(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")


def _likelihood(folder: str, question: str, choice: str) -> float:
    """The log likelihood of a choice by transformers, in the server's dtype."""
    import torch

    tokenizer, model = _transformers(folder)
    context = f"Question: {question}\nAnswer:"
    before, whole = tokenizer(context).input_ids, tokenizer(f"{context} {choice}").input_ids
    with torch.inference_mode():
        scores = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(scores[at - 1, whole[at]]) for at in range(len(before), len(whole)))


if __name__ == "__main__":
    main(*sys.argv[1:])
