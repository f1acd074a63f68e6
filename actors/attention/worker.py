"""Step 4 of a request's walk: takes sequences, drives the engine in a thread, streams tokens back.

A plain class: Ray Serve wraps it (actors/ray_shells/deployments.py), `moesaic generate` uses it as it is.
The event loop's side only queues commands and hands out tokens; the engine's thread does the rest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from actors.attention.build import HostAccess, build_engine
from actors.attention.status import experts_report, worker_status
from actors.engine.cache_change import change_cache
from actors.engine.engine import StepOutput
from actors.engine.failed_steps import FailedSteps
from actors.engine.isolation import failure_of, lost_to
from actors.engine.loaded_engine import LoadedEngine
from actors.expert_client.host_connections import Locate
from actors.experts.memory.shelves import Shelves
from actors.experts.memory.warm_up import warm_up
from cluster.config.load import MoesaicConfig, worker_threads
from cluster.errors import MoesaicError, Overloaded, Unavailable
from cluster.logs import log_event
from cluster.model.info import ModelInfo
from cluster.protocols import StateStore
from cluster.semantics.knowledge import Knowledge
from cluster.stats.cluster_counts import ClusterCounts
from cluster.stats.policy_state_loop import PolicyStateLoop, StatefulPolicies
from cluster.stats.statistics_loop import StatisticsLoop
from cluster.status.experts import ExpertsReport
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus
from cluster.token_stream.progress import Progress, ProgressMeter
from cluster.types import FinishReason, GenerationRequest, RequestId, StartupPhase, TokenChunk, TokenLogprob

_LOG = logging.getLogger(__name__)
_IDLE_POLL_S = 0.5

Command = Callable[[LoadedEngine], None]


@dataclass(slots=True, eq=False)
class _Stream:
    """Tokens of one sequence on their way to the client: what gathers while nobody looks goes out together."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached: int = 0
    queued_s: float = 0.0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: BaseException | None = None

    def take(self) -> TokenChunk:
        """Everything gathered so far, as one chunk."""
        chunk = TokenChunk(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs) if self.request.sampling.num_logprobs is not None else None,
            finish_reason=self.finish_reason,
            num_cached_tokens=self.num_cached,
            queued_s=self.queued_s,
            prompt_logprobs=self.prompt_logprobs,
        )
        self.token_ids, self.logprobs, self.prompt_logprobs = [], [], None
        self.ready.clear()
        return chunk


class AttentionWorker:
    """One engine and its clients' streams. `start` returns at once; the phase tells when it is ready."""

    def __init__(
        self,
        config: MoesaicConfig,
        info: ModelInfo,
        store: StateStore,
        locate_host: Locate | None = None,
        shelves: Shelves | None = None,
        *,
        num_nodes: int = 1,
    ) -> None:
        """Args: locate_host: where expert host i is now; None: all experts are computed here. shelves: other nodes'
        memory, if experts are kept there. num_nodes: that workers and hosts spread over."""
        self.worker_id = uuid.uuid4().hex[:8]
        self.info = info
        self.phase = StartupPhase.STARTING
        self.error: MoesaicError | None = None
        self.parts: LoadedEngine | None = None
        self.failed_steps = FailedSteps()
        self.is_draining = False  # takes no more requests; those under way go on
        self._store = store
        self.statistics = StatisticsLoop(store, info.fingerprint, half_life_s=config.scheduler.half_life_s)
        self.cluster_counts = ClusterCounts(store, info.fingerprint)
        path = config.experts.policy_state
        self.learned = PolicyStateLoop(store, info.fingerprint, self.worker_id, None if path is None else Path(path))
        self._config = config
        self._hosts = None if locate_host is None else HostAccess(worker_id=self.worker_id, locate=locate_host)
        self._shelves, self._num_nodes = shelves, num_nodes
        self.max_open = config.attention.max_running + config.attention.max_queue
        experts = config.experts
        self._meter = ProgressMeter(
            first_step_s=experts.load_timeout_s, wait_s=experts.host_timeout_s if experts.hosts else 0.0
        )
        self._streams: dict[RequestId, _Stream] = {}
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._on_ready: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Load the model and step, in a thread of its own. Args: on_ready: called there, once."""
        self._on_ready = on_ready
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread; streams under way get Unavailable."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    @property
    def num_open(self) -> int:
        """Requests taken and not over, running or not."""
        return len(self._streams)

    def progress(self) -> Progress:
        """How this worker gets on with what it was given. From any thread but the engine's."""
        parts = self.parts
        if parts is None:
            return Progress()
        engine = parts.engine
        moved = sum(parts.backend.store.counters.bytes_moved.values()) if parts.backend is not None else 0
        marks = (engine.counters.steps, engine.runner.num_layers_run, moved)
        return self._meter.look(marks, step_s=engine.times.decode_s, has_work=bool(self._streams))

    def check_admission(self, request: GenerationRequest | None = None) -> None:
        """Return if one more sequence would be taken now. One that goes on where another worker stopped always fits.

        Raises:
            Unavailable: not ready, or draining.
            Overloaded: the queue is full.
        """
        if self.phase is not StartupPhase.READY:
            raise self.error or Unavailable(f"the worker is {self.phase}; try again later")
        if self.is_draining:
            raise Unavailable("the worker is draining; another one takes requests")
        if len(self._streams) >= self.max_open and not (request is not None and request.emitted_ids):
            raise Overloaded(
                f"{len(self._streams)} requests are running or waiting, the most there may be; try again later"
            )

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream one sequence (AttentionWorkerClient.generate)."""
        self.check_admission(request)
        stream = _Stream(request, asyncio.get_running_loop())
        self._streams[request.request_id] = stream
        self._commands.put(lambda parts: self._add(parts, stream))
        try:
            while True:
                await stream.ready.wait()
                # By the chunk that was taken, not by the stream: more may come, the end too, while the reader has it.
                chunk = stream.take()
                if chunk.token_ids or stream.error is None:
                    yield chunk
                if chunk.finish_reason is not None:
                    return
                if stream.error is not None and not stream.token_ids:
                    raise stream.error
        finally:
            if self._streams.pop(request.request_id, None) is not None and stream.finish_reason is None:
                self._commands.put(lambda parts: parts.engine.abort(request.request_id))

    async def abort(self, request_id: RequestId) -> None:
        """Stop a sequence before the next step; its stream ends with reason abort."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        self._commands.put(lambda parts: parts.engine.abort(request_id))
        stream.finish_reason = FinishReason.ABORT
        stream.ready.set()

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """Count, batch and keep experts by this from the next step on. From any thread."""
        self._commands.put(lambda parts: parts.engine.set_knowledge(knowledge))

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        """What this worker says of itself (AttentionWorkerClient: here the cluster is one worker)."""
        return (worker_status(self, self._config),)

    async def host_statuses(self) -> tuple[ExpertHostStatus, ...]:
        """Hosts are other processes: none is known here."""
        return ()

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        """Residency and activation per layer; empty while loading."""
        return (await experts_report(self),)

    async def set_expert_cache(self, setting: str) -> tuple[WorkerStatus, ...]:
        """AttentionWorkerClient.set_expert_cache, of this worker."""
        parts = self.parts
        if parts is None:
            raise self.error or Unavailable(f"the worker is {self.phase}; try again later")
        await asyncio.to_thread(change_cache, parts, setting)
        return await self.worker_statuses()

    def _run(self) -> None:
        try:
            threads = worker_threads(self._config, os.cpu_count() or 2)
            parts = build_engine(
                self._config,
                self.info,
                threads=threads,
                hosts=self._hosts,
                shelves=self._shelves,
                num_nodes=self._num_nodes,
                on_phase=self._set_phase,
            )
            if parts.policy_runner is not None:
                self.learned.start(StatefulPolicies(parts.policy_runner.policies.learned, parts.policy_runner.ask))
            if parts.backend is not None:
                self.phase = StartupPhase.WARMING_UP
                warm_up(parts.backend.store, self._store, self.info.fingerprint)
        except MoesaicError as error:
            self.error, self.phase = error, StartupPhase.FAILED
            return
        except Exception as error:  # noqa: BLE001 - transformers raises anything; status has to name it
            log_event(_LOG, logging.ERROR, "loading failed", error=error)
            self.error, self.phase = MoesaicError(f"loading {self.info.path} failed: {error}"), StartupPhase.FAILED
            return
        self.parts, self.phase = parts, StartupPhase.READY
        self._on_ready()
        self.statistics.start(parts.recorder)
        while self._apply_commands(parts):
            self._step(parts)
        parts.recorder.settle()
        self.statistics.stop()
        self.learned.stop()
        parts.dispatcher.close()
        parts.lease.close()
        self._fail_all(Unavailable("the worker is stopping; try again"))

    def _set_phase(self, phase: StartupPhase) -> None:
        self.phase = phase

    def _apply_commands(self, parts: LoadedEngine) -> bool:
        """Apply what came in since the last step; waits when there is no work. False: time to end."""
        while True:
            try:
                block = not parts.engine.has_work
                command = self._commands.get(block=block, timeout=_IDLE_POLL_S if block else None)
            except queue.Empty:
                if parts.engine.has_work:
                    return True
                continue
            if command is None:
                return False
            try:
                command(parts)
            except Exception as error:  # noqa: BLE001 - the engine's thread is everybody's: it must not end by one command
                log_event(_LOG, logging.ERROR, "a command to the engine failed", error=error)

    def _add(self, parts: LoadedEngine, stream: _Stream) -> None:
        try:
            parts.engine.add(stream.request)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one request is that request's alone
            self._call(stream, self._fail, [stream], failure_of(error, "taking the request in"))

    def _step(self, parts: LoadedEngine) -> None:
        try:
            outputs = parts.engine.step()
        except Exception as error:  # noqa: BLE001 - top loop: nobody's fault in particular, so all may try again
            log_event(_LOG, logging.ERROR, "step failed", error=error)
            self.failed_steps.note(0, [error])
            stopped = parts.engine.abort_all()
            reason = lost_to(error)
            streams = [self._streams[i] for i in stopped if i in self._streams]
            if streams:
                self._call(streams[0], self._fail, streams, reason)
            return
        if outputs:
            errors = [output.error for output in outputs if output.error is not None]
            self.failed_steps.note(len(outputs) - len(errors), errors)
            first = next((s for o in outputs if (s := self._streams.get(o.request_id)) is not None), None)
            if first is not None:
                self._call(first, self._deliver, outputs)

    def _call(self, stream: _Stream, function: Callable[..., None], *args: object) -> None:
        """Run on the clients' event loop; once per step, whatever the number of streams."""
        try:
            stream.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            log_event(_LOG, logging.WARNING, "event loop closed with streams open")

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None or stream.finish_reason is not None:
                continue
            if output.error is not None:
                self._fail([stream], output.error)
                continue
            stream.token_ids.append(output.token_id)
            if output.logprob is not None:
                stream.logprobs.append(output.logprob)
            stream.finish_reason = output.finish_reason
            stream.num_cached = output.num_cached
            stream.queued_s = output.queued_s
            if output.prompt_logprobs is not None:
                stream.prompt_logprobs = output.prompt_logprobs
            stream.ready.set()

    def _fail(self, streams: list[_Stream], error: BaseException) -> None:
        for stream in streams:
            stream.error = error
            stream.ready.set()

    def _fail_all(self, error: BaseException) -> None:
        streams = list(self._streams.values())
        if streams:
            self._call(streams[0], self._fail, streams, error)
