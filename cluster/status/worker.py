"""What one attention worker says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cluster.status.expert_memory import ExpertMemoryStatus
from cluster.status.fields import Row, Unit, counter, fact, gauge
from cluster.types import StartupPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlaneStatus:
    """One worker's traffic with expert hosts since start.

    Steps waited `wait_s` for answers; hosts computed for `host_s`: the difference is the way there and back.
    """

    carriers: Annotated[tuple[str, ...], fact("How each host is reached: shm, grpc, ray, or away.")]
    layers: Annotated[int, fact("MoE layers that were sent away.")]
    frames: Annotated[int, fact("Dispatch frames sent.")]
    rows: Annotated[int, fact("Token rows in them.")]
    wait_s: Annotated[float, fact("Time that steps waited for answers.", Unit.SECONDS)]
    send_s: Annotated[float, fact("Time spent sending.", Unit.SECONDS)]
    host_s: Annotated[float, fact("Time that hosts spent computing.", Unit.SECONDS)]
    redispatched: Annotated[int, fact("Token rows sent again, to another host.")]
    fallbacks: Annotated[int, fact("Token rows computed by the worker itself, because no host could.")]
    hosts_lost: Annotated[int, fact("Connections to hosts that were lost.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One attention worker now."""

    worker_id: Annotated[str, fact("Unique in the cluster, as long as the process lives.")]
    phase: Annotated[StartupPhase, fact("What it is doing.")]
    error: Annotated[str | None, fact("Why it failed.")]
    model: Annotated[str, fact("Name of the model.")]
    dtype: Annotated[str, fact("Floating-point type that it computes in.")]
    max_model_len: Annotated[int, fact("Longest sequence, tokens.")]
    num_running: Annotated[int, gauge("moesaic_num_requests_running", "Sequences in the running batch.")]
    num_waiting: Annotated[int, gauge("moesaic_num_requests_waiting", "Sequences that wait for the batch.")]
    kv_blocks_total: Annotated[int, fact("Blocks of KV cache.")]
    kv_blocks_used: Annotated[int, fact("Blocks that running sequences or kept prefixes use.")]
    num_preemptions: Annotated[int, counter("moesaic_preemptions", "Sequences preempted for want of KV blocks.")]
    generated_tokens: Annotated[int, counter("moesaic_engine_generation_tokens", "Tokens generated.")]
    prompt_tokens: Annotated[int, counter("moesaic_engine_prompt_tokens", "Prompt tokens taken in.")]
    cached_prompt_tokens: Annotated[
        int, counter("moesaic_prefix_cache_hit_tokens", "Prompt tokens found in the KV cache.")
    ]
    expert_memory: ExpertMemoryStatus | None
    data_plane: DataPlaneStatus | None = None
    degraded: Annotated[tuple[str, ...], fact("What works only in part, in words.")] = ()
    failed_steps: Annotated[int, gauge("moesaic_failed_steps", "Steps in a row that gave no token.")] = 0
    is_failing: Annotated[bool, fact("Whether those are so many that it had better get no requests.")] = False

    @property
    def kv_usage(self) -> Annotated[float, gauge("moesaic_kv_cache_usage_ratio", "Used share of KV blocks.")]:
        """0 to 1."""
        return self.kv_blocks_used / max(1, self.kv_blocks_total)


WORKER_ROWS: tuple[Row, ...] = (
    ("phase", "{phase}"),
    ("model", "{model} ({dtype}, {max_model_len} tokens)"),
    ("running / waiting", "{num_running} / {num_waiting}"),
    ("KV blocks", "{kv_blocks_used} of {kv_blocks_total}"),
    ("tokens", "{prompt_tokens} prompt, {generated_tokens} generated"),
)
"""What the command line shows of it, before its expert memory."""
