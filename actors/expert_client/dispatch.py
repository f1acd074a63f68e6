"""Dispatch with experts on other processes: each row goes at most once to each host and comes back as one partial sum.

Local experts are computed while the hosts compute theirs. What a host does not answer in time, or refuses, goes to
another owner, else it is computed here from the checkpoint. Knows rows, routes and deadlines; knows no carriers.

Shapes: T token rows, D model dim, K experts per token (top-k); t the rows of one part.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.data_plane.channel import HostLost, checked_rows
from actors.data_plane.frames import CombineFrame, DispatchFrame, FrameError, RefusalReason
from actors.expert_client.host_connections import HostConnections
from actors.expert_client.host_memory import HostMemory
from actors.expert_client.local_memory import LocalMemory
from actors.expert_client.routes import Routes
from actors.expert_client.row_shares import RowShare, SentFrame, as_wire
from actors.experts.dispatch import padded
from actors.experts.policy_runner import PolicyRunner
from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork
from cluster.errors import MoesaicError
from cluster.execution.replica_choice import NOBODY, choose_replicas

_MAX_ROUNDS = 4  # of asking hosts; then the rows are computed here
_GRACE_S = 0.05  # to fetch an answer that lay there while the worker was busy
_RENEW_TIMEOUT_S = 2.0


@dataclass(slots=True)
class DataPlaneCounters:
    """Since start, of one worker. `wait_s`: steps waited for hosts; `host_s`: of it, hosts computed.

    hedged: parts that a host was too slow for; they are among those redispatched.
    """

    layers: int = 0
    frames: int = 0
    rows: int = 0
    wait_s: float = 0.0
    send_s: float = 0.0
    host_s: float = 0.0
    redispatched: int = 0
    hedged: int = 0
    fallbacks: int = 0


class HostDispatcher:
    """A Dispatcher over expert hosts and a worker's own memory."""

    def __init__(
        self,
        links: HostConnections,
        local: LocalMemory,
        recorder: ActivationRecorder,
        *,
        num_experts: int,
        timeout_s: float,
        memory: HostMemory | None = None,
        policy_runner: PolicyRunner | None = None,
    ) -> None:
        """Args: memory: of all hosts, where policies look at it. policy_runner: is closed with this."""
        self.recorder = recorder
        self.links = links
        self.local = local
        self.counters = DataPlaneCounters()
        self.num_experts = num_experts
        self.timeout_s = timeout_s
        self.memory = memory
        self._policy_runner = policy_runner
        self._step = 0

    def start(self, work: ExpertWork, num_rows: int, num_decode: int) -> Callable[[], Tensor]:
        """Send rows to hosts, compute what is here; see Dispatcher."""
        ids_TK = work.topk_ids_TK[:num_rows]
        self.recorder.record(work, num_rows, num_decode)
        self.links.review(self.timeout_s)
        if self.local.fallback is not None and self.links.is_complete:
            self.local.release_unused()
        return _LayerRun(self, work, ids_TK.numpy(), num_rows).start()

    def close(self) -> None:
        """End the connections and give the memory back."""
        if self._policy_runner is not None:
            self._policy_runner.close()
        self.links.close()
        self.local.close()

    def next_step(self) -> int:
        """A number for the frames of one layer."""
        self._step += 1
        return self._step


class _LayerRun:
    """One layer of one micro-batch under way."""

    def __init__(self, owner: HostDispatcher, work: ExpertWork, ids_TK: np.ndarray, num_rows: int) -> None:
        self._owner = owner
        self._layer = work.layer
        self._hidden = work.hidden_TD
        self._x_TD = work.hidden_TD[:num_rows].contiguous()
        self._wire_TD = as_wire(self._x_TD)
        self._ids_TK = ids_TK
        self._weights_TK = work.topk_weights_TK[:num_rows].float().numpy()
        self._total: Tensor | None = None
        self._sent: list[RowShare] = []
        self._stall_s = 0.0  # of the host that waited longest for experts

    def start(self) -> Callable[[], Tensor]:
        if len(self._ids_TK):
            with self._settled_on_error():
                self._begin()
        return self.finish

    def _begin(self) -> None:
        owner = self._owner
        began = time.perf_counter()
        here = owner.local.resident(self._layer)
        ids, none = self._ids_TK, owner.num_experts
        is_here = None if here is None else here[ids]
        if is_here is None or not is_here.any():
            self._send(RowShare(None, ids, self._weights_TK))
        else:
            self._send(RowShare(None, ids, self._weights_TK).masked(~is_here, none))
        owner.counters.layers += 1
        owner.counters.send_s += time.perf_counter() - began
        if is_here is not None and is_here.any():
            self._compute_here(RowShare(None, ids, self._weights_TK).masked(is_here, none))
            if owner.links.routes.channels:
                owner.local.admit(self._layer, np.unique(ids[~is_here]))
        elif here is not None:
            owner.local.admit(self._layer, np.unique(ids))

    def finish(self) -> Tensor:
        """Wait for the hosts; the layer's output.

        Raises:
            ExpertReadError: the checkpoint could not be read in a host's place.
        """
        with self._settled_on_error():
            for round_ in range(1, _MAX_ROUNDS + 1):
                failed: list[RowShare] = []
                while self._sent:
                    part = self._sent.pop(0)
                    if not self._collect(part):
                        failed.append(part)
                self._owner.counters.redispatched += len(failed)
                for part in failed:
                    if round_ < _MAX_ROUNDS:
                        self._send(part)
                    else:
                        self._fall_back(part)
                if not failed:
                    break
        if self._owner.memory is not None:
            self._owner.memory.note_stall(self._stall_s)
        if self._total is None:
            self._total = torch.zeros(self._x_TD.shape, dtype=torch.float32)
        return padded(self._total.to(self._hidden.dtype), len(self._hidden))

    @contextlib.contextmanager
    def _settled_on_error(self) -> Iterator[None]:
        """Fetch what is under way before an error ends the layer: an answer that nobody fetches keeps its room."""
        try:
            yield
        except MoesaicError:
            while self._sent:
                with contextlib.suppress(MoesaicError):
                    self._collect(self._sent.pop())
            raise

    def _send(self, part: RowShare) -> None:
        """Give a part to owners of its experts; what nobody owns now is computed here."""
        routes, none = self._owner.links.routes, self._owner.num_experts
        if not part.ids_tK.size:
            return
        if routes.is_whole and part.rows is None and not (part.ids_tK == none).any():
            self._give(part, routes, 0)
            return
        replicas, ids = routes.replicas[self._layer], part.ids_tK
        owners = choose_replicas(ids, replicas, routes.costs()) if replicas.replicated else replicas.sole[ids]
        first = int(owners.flat[0])
        if first >= 0 and (owners == first).all():
            self._give(part, routes, first)
            return
        for position in range(len(routes.channels)):
            if (owners == position).any():
                self._give(part.masked(owners == position, none), routes, position)
        if (owners == NOBODY).any():
            self._fall_back(part.masked(owners == NOBODY, none))

    def _fall_back(self, part: RowShare) -> None:
        self._owner.counters.fallbacks += 1
        self._compute_here(part)

    def _give(self, part: RowShare, routes: Routes, position: int) -> None:
        owner, channel = self._owner, routes.channels[position]
        frame = DispatchFrame(
            sequence=channel.next_sequence(),
            epoch=routes.epochs[position],
            step=owner.next_step(),
            layer=self._layer,
            micro_batch=0,
            deadline_us=int(owner.timeout_s * 1e6),
            rows=self._wire_TD if part.rows is None else self._wire_TD[part.rows],
            expert_ids=part.ids_tK,
            weights=part.weights_tK,
        )
        has_others = routes.has_replicas and routes.have_others(self._layer, part.experts(owner.num_experts), position)
        try:
            channel.send(frame)
            part.sent = SentFrame(channel, frame, routes.times[position], time.monotonic(), has_others)
        except HostLost as error:
            owner.links.lose(channel, error.message)
            part.sent = None
        owner.counters.frames += 1
        owner.counters.rows += len(frame.rows)
        self._sent.append(part)

    def _collect(self, part: RowShare) -> bool:
        """Add a part's sums; False if its host did not give them."""
        sent, owner = part.sent, self._owner
        if sent is None:
            return False
        part.sent = None
        began = time.perf_counter()
        try:
            if not self._is_answered(part, sent):
                return False
            answer = checked_rows(sent.frame, sent.channel.receive(sent.frame.sequence, time.monotonic() + _GRACE_S))
        except (HostLost, FrameError) as error:
            owner.links.lose(sent.channel, error.message)
            return False
        finally:
            owner.counters.wait_s += time.perf_counter() - began
        if isinstance(answer, CombineFrame):
            self._learn(part, sent, answer.busy_us / 1e6)
            self._note(sent, answer)
            self._add(part.rows, torch.from_numpy(answer.rows))
            return True
        if answer.reason is RefusalReason.FAILED:  # it would fail again; here the error, if any, has a cause
            owner.counters.fallbacks += 1
            self._compute_here(part)
            return True
        if answer.reason is RefusalReason.STALE_EPOCH:
            owner.links.refused(sent.channel, answer.epoch, _RENEW_TIMEOUT_S)
        elif answer.reason is RefusalReason.LATE:
            owner.links.suspect(sent.channel)
        else:
            owner.links.lose(sent.channel, answer.message)
        return False

    def _is_answered(self, part: RowShare, sent: SentFrame) -> bool:
        """Wait for a part's answer as long as that is the cheapest; then others take it, and the answer is dropped.

        Where others have the experts, that is a few times what its host usually takes. Where they would have to be
        read here, it is as long again as reading takes: so waiting costs at most twice what the better choice would.
        """
        owner, rows = self._owner, len(sent.frame.rows)
        end_s = sent.sent_s + owner.timeout_s
        until_s = max(sent.sent_s + sent.times.patience_s(rows, owner.timeout_s), time.monotonic() + _GRACE_S)
        if sent.channel.wait_for(sent.frame.sequence, until_s):
            return True
        if not sent.has_others:
            until_s += owner.local.read_s(len(part.experts(owner.num_experts)))
            if sent.channel.wait_for(sent.frame.sequence, min(until_s, end_s)):
                return True
        waited_s = time.monotonic() - sent.sent_s
        if waited_s >= owner.timeout_s:
            raise HostLost(f"host {sent.channel.welcome.host_id}: no answer in time")
        sent.times.observe(rows, waited_s)
        sent.channel.abandon(sent.frame.sequence)
        owner.links.suspect(sent.channel)
        owner.counters.hedged += 1
        return False

    def _learn(self, part: RowShare, sent: SentFrame, busy_s: float) -> None:
        owner = self._owner
        owner.counters.host_s += busy_s
        sent.times.observe(len(sent.frame.rows), time.monotonic() - sent.sent_s, busy_s)
        if owner.links.routes.has_replicas:  # else there is nothing to choose by it
            num_choices = int(np.count_nonzero(part.ids_tK != owner.num_experts))
            sent.times.cost.observe(len(part.experts(owner.num_experts)), num_choices, busy_s)

    def _note(self, sent: SentFrame, answer: CombineFrame) -> None:
        memory, frame = self._owner.memory, sent.frame
        if memory is not None:
            self._stall_s = max(self._stall_s, answer.stall_us / 1e6)
            memory.note_frame(frame.rows.nbytes + frame.expert_ids.nbytes + frame.weights.nbytes + answer.rows.nbytes)
            memory.note_answer(sent.channel.welcome.host_id, answer)

    def _compute_here(self, part: RowShare) -> None:
        x_tD = self._x_TD if part.rows is None else self._x_TD[torch.from_numpy(part.rows)]
        ids, weights = torch.from_numpy(part.ids_tK), torch.from_numpy(part.weights_tK)
        self._add(part.rows, self._owner.local.partial_sums(self._layer, x_tD, ids, weights))

    def _add(self, rows: np.ndarray | None, sums_tD: Tensor) -> None:
        if self._total is None:
            if rows is None:
                self._total = sums_tD.clone()  # the host's memory is given back with the next answer
                return
            self._total = torch.zeros(self._x_TD.shape, dtype=torch.float32)
        if rows is None:
            self._total += sums_tD
        else:
            self._total[torch.from_numpy(rows)] += sums_tD
