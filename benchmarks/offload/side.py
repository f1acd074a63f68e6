"""One side of the comparison under limited memory, in a process of its own: started by `runs`, not by hand.

Reads its task as JSON from the command line; prints lines of JSON: what was loaded, then every step, then the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.offload.confinement import read_blkio_bytes
from benchmarks.offload.steps import Step, drive
from benchmarks.shared.measuring import read_bytes_of_process

MAX_LEN = 256  # tokens of a sequence, prompt and answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a side does. model: directory, or file for llama.cpp. cache: share of the routed-expert bytes that may be
    held; prompts: token ids; num_tokens of each; a peer stops after max_tokens in all, or limit_s seconds.
    learned: file of what our policies learned from other prompts."""

    side: str
    model: str
    offload_folder: str
    cache: float
    policy: str
    prompts: Sequence[Sequence[int]]
    num_tokens: int
    concurrency: int
    max_tokens: int
    limit_s: float
    kv_bytes: int
    blkio_counter: str = ""
    device: str = ""
    learned: str = ""

    def read_bytes(self) -> int:
        """Bytes read from the disk so far: by the cgroup's count, else the process's."""
        if self.blkio_counter:
            return read_blkio_bytes(Path(self.blkio_counter), self.device)
        return read_bytes_of_process()

    def step(self, prompt: int, token: int, number: int, began_s: float, bytes_before: int) -> Step:
        """The step of an engine without batches that has just made `token`, the `number`-th of its prompt."""
        is_first = number == 0
        joined = (prompt,) if is_first else ()
        ended_s = time.perf_counter()
        return Step(began_s, ended_s, ((prompt, token),), is_first, joined, self.read_bytes() - bytes_before)


Loaded = tuple[int, Callable[[], Generator[Step]]]


def main() -> int:
    warnings.simplefilter("ignore")
    task = Task(**json.loads(sys.argv[1]))
    began_s = time.perf_counter()
    held_bytes, run = SIDES[task.side](task)
    _print({"loaded": {"held_bytes": held_bytes, "seconds": time.perf_counter() - began_s}})
    done = 0
    began_s = time.perf_counter()
    with contextlib.closing(run()) as steps:
        for step in steps:
            print(step.to_line(), flush=True)
            done += len(step.tokens)
            if done >= task.max_tokens or time.perf_counter() - began_s > task.limit_s:
                break
    _print({"done": done})
    return 0


def _ours(task: Task) -> Loaded:
    from actors.attention.build import build_engine
    from cluster.config.load import load_config
    from cluster.model.info import load_model_info
    from cluster.policies.policy_state import load_policy_state
    from cluster.stats.policy_state_loop import StatefulPolicies

    eviction, _, prediction = task.policy.partition("+")
    config = load_config(
        None,
        {
            "model": {"path": task.model, "dtype": "bfloat16", "max_model_len": MAX_LEN},
            "attention": {"kv_cache": str(task.kv_bytes)},
            "experts": {"cache": f"{100 * task.cache}%", "eviction": eviction, "prediction": prediction or "none"},
        },
    )
    info = load_model_info(task.model, max_model_len=MAX_LEN)
    parts = build_engine(config, info, threads=1)
    if task.learned and parts.policy_runner is not None:
        learned = StatefulPolicies(parts.policy_runner.policies.learned, parts.policy_runner.ask)
        learned.load(load_policy_state(Path(task.learned), info.fingerprint))
    store = parts.store
    dense = sum(p.numel() * p.element_size() for p in parts.engine.runner.model.parameters() if not p.is_meta)

    def run() -> Generator[Step]:
        try:
            yield from drive(
                parts,
                task.prompts,
                num_tokens=task.num_tokens,
                concurrency=task.concurrency,
                read_bytes=task.read_bytes,
            )
        finally:
            parts.dispatcher.close()

    return store.num_slots * store.slot_bytes + dense + task.kv_bytes, run


def _transformers(task: Task) -> Loaded:
    """transformers with accelerate: dense weights and as many whole experts modules as the share holds in memory, the
    other modules on disk; one module's worth of the share is left for the module under way."""
    import torch
    from accelerate import dispatch_model, init_empty_weights
    from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    from actors.model.seams import cache_argument

    torch.set_num_threads(1)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task.model), dtype=torch.bfloat16)
    model.eval()
    modules = [name for name, _ in model.named_modules() if name.endswith(".mlp.experts")]
    num_held = max(0, int(task.cache * len(modules)) - 1)
    on_disk = modules[num_held:]
    weights, held_bytes = OffloadedWeightsLoader(save_folder=task.offload_folder), 0
    for name, _ in list(model.named_parameters()):
        if not any(name.startswith(f"{module}.") for module in on_disk):
            value = weights[name].clone()
            set_module_tensor_to_device(model, name, "cpu", value=value)
            held_bytes += value.numel() * value.element_size()
    model.tie_weights()
    leaves = [name for name, module in model.named_modules() if ".experts" not in name and not list(module.children())]
    device_map: dict[str, Any] = dict.fromkeys((*leaves, *modules), "cpu") | dict.fromkeys(on_disk, "disk")
    cpu = torch.device("cpu")
    model = dispatch_model(model, device_map, main_device=cpu, offload_dir=task.offload_folder, force_hooks=True)

    @torch.no_grad()
    def run() -> Generator[Step]:
        for index, prompt in enumerate(task.prompts):
            cache, ids = DynamicCache(config=model.config), torch.tensor([prompt])
            for number in range(task.num_tokens):
                bytes_before, began_s = task.read_bytes(), time.perf_counter()
                token = int(
                    model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits[0, -1].argmax()
                )
                yield task.step(index, token, number, began_s, bytes_before)
                ids = torch.tensor([[token]])

    return held_bytes, run


def _llama_cpp(task: Task, *, reads_ahead: bool = True) -> Loaded:
    """llama.cpp over a mapped file: the kernel's page cache is its expert memory.

    Args: reads_ahead: False: a fault reads its page alone (MADV_RANDOM), for disks whose read-ahead is larger than
        what the memory can keep.
    """
    from llama_cpp import Llama

    llama = Llama(task.model, n_ctx=MAX_LEN, n_batch=64, n_threads=1, n_threads_batch=1, use_mmap=True, verbose=False)
    if not reads_ahead:
        _advise_random(Path(task.model))

    def run() -> Generator[Step]:
        for index, prompt in enumerate(task.prompts):
            tokens = llama.generate(list(prompt), temp=0.0)
            for number in range(task.num_tokens):
                bytes_before, began_s = task.read_bytes(), time.perf_counter()
                token = int(next(tokens))
                yield task.step(index, token, number, began_s, bytes_before)

    return 0, run


SIDES: dict[str, Callable[[Task], Loaded]] = {
    "moesaic": _ours,
    "transformers": _transformers,
    "llama.cpp": _llama_cpp,
    "llama.cpp, no read-ahead": partial(_llama_cpp, reads_ahead=False),
}


def _advise_random(file: Path) -> None:
    """No read-ahead for this process's mappings of a file."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, stop = (int(address, 16) for address in line.split()[0].split("-"))
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_RANDOM):
                raise OSError(ctypes.get_errno(), "madvise")


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
