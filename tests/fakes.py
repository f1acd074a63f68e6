"""Stand-ins for what lives in other processes: scripted, with a call log, no Ray and no torch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.engine.failed_steps import FailedSteps
from cluster.errors import MoesaicError
from cluster.status.expert_memory import CalibrationBin, ExpertMemoryStatus, TierStatus
from cluster.status.experts import ClusterActivations, ExpertsReport, LayerActivations, LayerExperts
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus
from cluster.types import (
    FinishReason,
    GenerationRequest,
    Phase,
    RequestId,
    StartupPhase,
    Tier,
    TokenChunk,
    TokenLogprob,
)

MEMORY = ExpertMemoryStatus(
    eviction="moesaic",
    prediction="fmoe",
    tiers=(
        TierStatus(tier=Tier.DEVICE, budget_bytes=10, resident_bytes=5, num_resident=1, bytes_moved=0),
        TierStatus(tier=Tier.RAM, budget_bytes=15, resident_bytes=10, num_resident=2, bytes_moved=25, emulated=True),
        TierStatus(tier=Tier.DISK, budget_bytes=None, resident_bytes=0, num_resident=0, bytes_moved=5),
    ),
    budget_bytes=10,
    resident_bytes=5,
    model_expert_bytes=20,
    num_experts=4,
    num_resident=1,
    hits=7,
    misses=5,
    misses_by_tier={Tier.RAM: 3, Tier.REMOTE: 0, Tier.DISK: 2},
    late=1,
    prefetch_used=6,
    prefetch_wasted=8,
    prefetch_dropped=9,
    prefetch_bytes={Tier.RAM: 11, Tier.REMOTE: 0, Tier.DISK: 12},
    bytes_read=5,
    stall_s=0.5,
    search_share=0.25,
    calibration=(
        CalibrationBin(predicted=0.125, observed=0.25, count=16),
        CalibrationBin(predicted=0.75, observed=0.5, count=4),
    ),
    read_mode="direct",
    kernel="fake",
)


class FakeAttentionWorker:
    """An `AttentionWorkerClient` that emits a script, again and again, until max_tokens or the end token.

    `pause_after` tokens it waits for `resume`; `fail_with` is raised after `fail_after` tokens.
    """

    def __init__(
        self,
        script: Sequence[int] = (10, 11, 12),
        *,
        chunk_size: int = 1,
        end_token: int | None = None,
        pause_after: int | None = None,
        fail_with: Exception | None = None,
        fail_after: int = 0,
        num_cached_tokens: int = 0,
        queued_s: float = 0.0,
    ) -> None:
        self.queued_s = queued_s
        self.script = tuple(script)
        self.chunk_size = chunk_size
        self.end_token = end_token
        self.pause_after = pause_after
        self.resume = asyncio.Event()
        self.paused = asyncio.Event()
        self.fail_with = fail_with
        self.fail_after = fail_after
        self.num_cached_tokens = num_cached_tokens
        self.phase = StartupPhase.READY
        self.status_error: Exception | None = None
        self.failed_steps = FailedSteps()
        self.requests: list[GenerationRequest] = []
        self.aborted: list[RequestId] = []
        self.cache_settings: list[str] = []
        self.cache_error: MoesaicError | None = None
        self.closed: list[RequestId] = []
        self.num_emitted = 0

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        try:
            sent = 0
            while True:
                if self.fail_with is not None and sent >= self.fail_after:
                    raise self.fail_with
                if self.pause_after is not None and sent >= self.pause_after:
                    self.paused.set()
                    await self.resume.wait()
                count = min(self.chunk_size, request.sampling.max_tokens - sent)
                ids = tuple(self.script[(sent + i) % len(self.script)] for i in range(count))
                if self.end_token in ids:
                    ids = ids[: ids.index(self.end_token) + 1]
                sent += len(ids)
                self.num_emitted += len(ids)
                reason = None
                if self.end_token is not None and ids[-1] == self.end_token:
                    reason = FinishReason.STOP
                elif sent >= request.sampling.max_tokens:
                    reason = FinishReason.LENGTH
                yield self._chunk(request, ids, reason, is_first=sent == len(ids))
                if reason is not None:
                    return
                await asyncio.sleep(0)
        finally:
            self.closed.append(request.request_id)

    async def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        if self.status_error is not None:
            raise self.status_error
        return (self._status(),)

    def _status(self) -> WorkerStatus:
        return WorkerStatus(
            worker_id="w0",
            phase=self.phase,
            error="shard 2 is truncated" if self.phase is StartupPhase.FAILED else None,
            model="moesaic-demo",
            dtype="float32",
            max_model_len=2048,
            num_running=0,
            num_waiting=0,
            kv_blocks_total=8,
            kv_blocks_used=0,
            num_preemptions=0,
            generated_tokens=0,
            prompt_tokens=0,
            cached_prompt_tokens=0,
            expert_memory=MEMORY,
            failed_steps=self.failed_steps.in_a_row,
            is_failing=self.failed_steps.is_failing,
            degraded=self.failed_steps.degraded,
        )

    async def host_statuses(self) -> tuple[ExpertHostStatus, ...]:
        return ()

    async def set_expert_cache(self, setting: str) -> tuple[WorkerStatus, ...]:
        if self.cache_error is not None:
            raise self.cache_error
        self.cache_settings.append(setting)
        return (self._status(),)

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        own = {Phase.PREFILL: (2, 3), Phase.DECODE: (0, 0)}
        layer = LayerExperts(
            layer=0,
            num_experts=2,
            resident=(1,),
            activations=own,
            hits=3,
            misses=1,
            ram_resident=(0, 1),
            misses_by_tier={Tier.RAM: 1, Tier.REMOTE: 0, Tier.DISK: 0},
            stall_s=0.25,
        )
        total = LayerActivations(layer=0, activations={Phase.PREFILL: (2, 6), Phase.DECODE: (0, 0)})
        cluster = ClusterActivations(layers=(total,), degraded=None)
        return (ExpertsReport(owner_id="w0", layers=(layer,), cluster=cluster),)

    def _chunk(
        self, request: GenerationRequest, ids: tuple[int, ...], reason: FinishReason | None, *, is_first: bool
    ) -> TokenChunk:
        """A prompt token's log-probability is minus its id, its rank 2, and token 7 is always likelier."""
        num, num_prompt = request.sampling.num_logprobs, request.sampling.num_prompt_logprobs
        scored = None
        if num_prompt is not None and is_first:
            top = ((7, -0.25),) * num_prompt
            scored = tuple(TokenLogprob(i, -float(i), top, 2) for i in request.prompt_ids[1:])
        entries = None
        if num is not None:
            entries = tuple(TokenLogprob(i, -0.5, tuple((i + n, -0.5 - n) for n in range(num))) for i in ids)
        return TokenChunk(
            token_ids=ids,
            logprobs=entries,
            finish_reason=reason,
            num_cached_tokens=self.num_cached_tokens,
            queued_s=self.queued_s,
            prompt_logprobs=scored,
        )


@dataclass
class AsgiCall:
    """One request driven by hand: what a server would do, with a client that can leave."""

    app: Any
    path: str
    body: Any = None
    method: str = "POST"
    headers: Sequence[tuple[bytes, bytes]] = ()
    sent: list[dict[str, Any]] = field(default_factory=list)
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    chunks: Sequence[bytes] | None = None

    async def run(self) -> None:
        parts = list(self.chunks) if self.chunks is not None else [json.dumps(self.body).encode()]

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await self.leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), *self.headers],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        await self.app(scope, receive, send)

    @property
    def status(self) -> int:
        return next(message["status"] for message in self.sent if message["type"] == "http.response.start")

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()
