"""Steps of one engine as every side of benchmark `offload` reports them, and the columns that follow from them.

Knows times, bytes and tokens; knows no engine but the loop that drives ours. Decode figures are of steps in which every
sequence decodes: steps with prompt rows count for the time to first token only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from actors.engine.loaded_engine import LoadedEngine
    from actors.experts.memory.counters import MemoryCounters


@dataclass(slots=True)
class MemoryUse:
    """What the expert memory counted in one step (or in several: they add). Rates come from `hits`, `late`, `misses`:
    resident when asked for, on their way by prefetch, and all that were not resident (late ones included). ram_bytes,
    disk_bytes: moved from these tiers."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    stall_s: float = 0.0
    ram_bytes: int = 0
    disk_bytes: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_dropped: int = 0

    def plus(self, other: MemoryUse, sign: int = 1) -> MemoryUse:
        """Field by field; sign -1: the difference."""
        mine, theirs = asdict(self), asdict(other)
        return MemoryUse(**{name: mine[name] + sign * theirs[name] for name in mine})


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Times in seconds on one clock; tokens: (prompt, token id) of what it produced; bytes_read: by the
    operating system's count; has_prompt_rows: some sequence took in its prompt; joined: prompts given to the engine
    as it began."""

    began_s: float
    ended_s: float
    tokens: tuple[tuple[int, int], ...]
    has_prompt_rows: bool
    joined: tuple[int, ...] = ()
    bytes_read: int = 0
    memory: MemoryUse | None = None

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps({"step": asdict(self)})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Step:
        """The inverse of `to_line`'s object."""
        memory = values.pop("memory")
        values["tokens"] = tuple((int(prompt), int(token)) for prompt, token in values["tokens"])
        values["joined"] = tuple(values["joined"])
        return cls(**values, memory=None if memory is None else MemoryUse(**memory))


@dataclass(slots=True)
class Figures:
    """What the steps of a cell (or of its rounds, together) amount to."""

    steps: list[Step] = field(default_factory=list)
    intervals_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)

    def add(self, steps: Sequence[Step]) -> None:
        """The steps of one run."""
        joined_s: dict[int, float] = {}
        last: dict[int, float] = {}
        for step in steps:
            joined_s |= dict.fromkeys(step.joined, step.began_s)
            for prompt, _ in step.tokens:
                if prompt in last:
                    self.intervals_s.append(step.ended_s - last[prompt])
                else:
                    self.first_token_s.append(step.ended_s - joined_s[prompt])
                last[prompt] = step.ended_s
        self.steps += steps

    def join(self, other: Figures) -> None:
        """The other's runs count as well."""
        self.steps += other.steps
        self.intervals_s += other.intervals_s
        self.first_token_s += other.first_token_s

    @property
    def decode(self) -> list[Step]:
        """Steps without prompt rows."""
        return [step for step in self.steps if not step.has_prompt_rows]

    @property
    def num_decoded(self) -> int:
        return sum(len(step.tokens) for step in self.decode)

    @property
    def decode_rate(self) -> float:
        """Tokens per second of decode steps; 0 of none."""
        elapsed_s = sum(step.ended_s - step.began_s for step in self.decode)
        return self.num_decoded / elapsed_s if elapsed_s else 0.0

    @property
    def elapsed_s(self) -> float:
        """Of all steps."""
        return sum(step.ended_s - step.began_s for step in self.steps)

    @property
    def memory(self) -> MemoryUse:
        """Of decode steps."""
        total = MemoryUse()
        for step in self.decode:
            total = total.plus(step.memory or MemoryUse())
        return total

    def columns(self) -> dict[str, float | str]:
        """The columns that every side has."""
        memory, asked = self.memory, max(self.memory.hits + self.memory.misses, 1)
        has_memory = any(step.memory for step in self.steps)
        return {
            "tok/s": self.decode_rate,
            "TPOT mean ms": 1e3 * float(np.mean(self.intervals_s or [0.0])),
            "p50 ms": percentile_ms(self.intervals_s, 50),
            "p99 ms": percentile_ms(self.intervals_s, 99),
            "TTFT ms": percentile_ms(self.first_token_s, 50),
            "hit": (memory.hits + memory.late) / asked if has_memory else "-",
            "timely": memory.hits / asked if has_memory else "-",
            "MB read/token": sum(step.bytes_read for step in self.decode) / max(self.num_decoded, 1) / 1e6,
        }


def percentile_ms(values_s: Sequence[float], percent: float) -> float:
    """Milliseconds; 0 of nothing."""
    return 1e3 * float(np.percentile(values_s, percent)) if values_s else 0.0


def drive(
    parts: LoadedEngine,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    concurrency: int,
    read_bytes: Callable[[], int] = lambda: 0,
) -> Iterator[Step]:
    """Greedy decoding by our engine, a closed loop: as soon as an answer ends the next prompt joins.

    Args:
        read_bytes: bytes that this process made the storage read so far.
    Raises:
        MoesaicError: a sequence failed.
    """
    from cluster.types import GenerationRequest, RequestId, SamplingParams

    engine, counters = parts.engine, parts.store.counters
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    waiting = list(range(len(prompts)))
    no_token_yet: set[int] = set()
    num_running = 0
    while waiting or engine.has_work:
        joined: list[int] = []
        while waiting and num_running < concurrency:
            prompt = waiting.pop(0)
            ids = tuple(prompts[prompt])
            engine.add(GenerationRequest(request_id=RequestId(str(prompt)), prompt_ids=ids, sampling=sampling))
            joined.append(prompt)
            num_running += 1
        no_token_yet.update(joined)
        before, bytes_before, began_s = memory_use(counters), read_bytes(), time.perf_counter()
        outputs = engine.step()
        ended_s = time.perf_counter()
        for output in outputs:
            if output.error is not None:
                raise output.error
        tokens = tuple((int(output.request_id), output.token_id) for output in outputs)
        yield Step(
            began_s,
            ended_s,
            tokens,
            bool(no_token_yet),
            tuple(joined),
            read_bytes() - bytes_before,
            memory_use(counters).plus(before, -1),
        )
        no_token_yet -= {prompt for prompt, _ in tokens}
        num_running -= sum(output.finish_reason is not None for output in outputs)


def memory_use(counters: MemoryCounters) -> MemoryUse:
    """The counters' totals over layers, since start."""
    from cluster.types import Tier

    return MemoryUse(
        hits=counters.num_hits,
        late=int(counters.late.sum()),
        misses=counters.num_misses,
        stall_s=float(counters.stall_s.sum()),
        ram_bytes=counters.bytes_moved[Tier.RAM],
        disk_bytes=counters.bytes_moved[Tier.DISK],
        prefetch_used=int(counters.prefetch_used.sum()),
        prefetch_wasted=int(counters.prefetch_wasted.sum()),
        prefetch_dropped=int(counters.prefetch_dropped.sum()),
    )
