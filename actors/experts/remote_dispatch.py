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

from actors.data_plane.channel import ExpertChannel, HostLost, checked_rows
from actors.data_plane.frames import CombineFrame, DispatchFrame, FrameError, RefusalReason
from actors.experts.dispatch import ExpertWork, padded
from actors.experts.host_links import HostLinks, Routes
from actors.experts.local_memory import LocalMemory
from actors.experts.recorder import ActivationRecorder
from cluster.errors import MoesaicError

_MAX_ROUNDS = 4  # of asking hosts; then the rows are computed here
_GRACE_S = 0.05  # to fetch an answer that lay there while the worker was busy
_NEW_PLAN_TIMEOUT_S = 2.0
_RENEW_TIMEOUT_S = 2.0


@dataclass(slots=True, eq=False)
class _Part:
    """Rows and choices of one layer that one owner is to compute. `rows` None: all of them."""

    rows: np.ndarray | None
    ids_tK: np.ndarray
    weights_tK: np.ndarray
    channel: ExpertChannel | None = None
    frame: DispatchFrame | None = None
    deadline_s: float = 0.0  # time.monotonic


@dataclass(slots=True)
class DataPlaneCounters:
    """Since start, of one worker. `wait_s`: steps waited for hosts; `host_s`: of it, hosts computed."""

    layers: int = 0
    frames: int = 0
    rows: int = 0
    wait_s: float = 0.0
    send_s: float = 0.0
    host_s: float = 0.0
    redispatched: int = 0
    fallbacks: int = 0


class HostDispatcher:
    """A Dispatcher over expert hosts and a worker's own memory."""

    def __init__(
        self,
        links: HostLinks,
        local: LocalMemory,
        recorder: ActivationRecorder,
        *,
        num_experts: int,
        timeout_s: float,
    ) -> None:
        self.recorder = recorder
        self.links = links
        self.local = local
        self.counters = DataPlaneCounters()
        self._num_experts = num_experts
        self._timeout_s = timeout_s
        self._step = 0

    def start(self, work: ExpertWork, num_rows: int, num_decode: int) -> Callable[[], Tensor]:
        """Send rows to hosts, compute what is here; see Dispatcher."""
        ids_TK = work.topk_ids_TK[:num_rows]
        self.recorder.record(work.layer, ids_TK, num_decode)
        if self.local.fallback is not None and self.links.is_complete:
            self.local.release_fallback()
        return _LayerRun(self, work, ids_TK.numpy(), num_rows).start()

    def close(self) -> None:
        """End the connections and give the memory back."""
        self.links.close()
        self.local.close()

    def next_step(self) -> int:
        """A number for the frames of one layer."""
        self._step += 1
        return self._step

    @property
    def timeout_s(self) -> float:
        return self._timeout_s

    @property
    def num_experts(self) -> int:
        return self._num_experts


class _LayerRun:
    """One layer of one micro-batch under way."""

    def __init__(self, owner: HostDispatcher, work: ExpertWork, ids_TK: np.ndarray, num_rows: int) -> None:
        self._owner = owner
        self._layer = work.layer
        self._hidden = work.hidden_TD
        self._x_TD = work.hidden_TD[:num_rows].contiguous()
        self._wire_TD = _as_wire(self._x_TD)
        self._ids_TK = ids_TK
        self._weights_TK = work.topk_weights_TK[:num_rows].float().numpy()
        self._total: Tensor | None = None
        self._sent: list[_Part] = []

    def start(self) -> Callable[[], Tensor]:
        if len(self._ids_TK):
            with self._settled_on_error():
                self._begin()
        return self.finish

    def _begin(self) -> None:
        owner = self._owner
        began = time.perf_counter()
        if owner.local.fallback is not None and owner.links.is_complete:
            owner.local.release_fallback()
        here = owner.local.resident(self._layer)
        ids, none = self._ids_TK, owner.num_experts
        is_here = None if here is None else here[ids]
        if is_here is None or not is_here.any():
            self._send(_Part(None, ids, self._weights_TK))
        else:
            self._send(_masked(_Part(None, ids, self._weights_TK), ~is_here, none))
        owner.counters.layers += 1
        owner.counters.send_s += time.perf_counter() - began
        if is_here is not None and is_here.any():
            self._compute_here(_masked(_Part(None, ids, self._weights_TK), is_here, none))
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
                failed: list[_Part] = []
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

    def _send(self, part: _Part) -> None:
        """Give a part to the owners of its experts; what nobody owns now is computed here."""
        routes, none = self._owner.links.routes, self._owner.num_experts
        if part.rows is not None or none in part.ids_tK:
            self._send_split(part, routes)
            return
        owners = routes.owner[self._layer][part.ids_tK]
        first = int(owners.flat[0])
        if first >= 0 and (routes.is_whole or (owners == first).all()):
            self._give(part, routes.channels[first])
        else:
            self._send_split(part, routes)

    def _send_split(self, part: _Part, routes: Routes) -> None:
        none = self._owner.num_experts
        table = np.append(routes.owner[self._layer], np.int16(-2))  # the last: a choice that is not part of this
        owners = table[part.ids_tK]
        for index, channel in enumerate(routes.channels):
            if (owners == index).any():
                self._give(_masked(part, owners == index, none), channel)
        if (owners == -1).any():
            self._fall_back(_masked(part, owners == -1, none))

    def _fall_back(self, part: _Part) -> None:
        self._owner.counters.fallbacks += 1
        self._compute_here(part)

    def _give(self, part: _Part, channel: ExpertChannel) -> None:
        owner = self._owner
        part.channel = channel
        part.frame = DispatchFrame(
            sequence=channel.next_sequence(),
            epoch=channel.welcome.epoch,
            step=owner.next_step(),
            layer=self._layer,
            micro_batch=0,
            deadline_us=int(owner.timeout_s * 1e6),
            rows=self._wire_TD if part.rows is None else self._wire_TD[part.rows],
            expert_ids=part.ids_tK,
            weights=part.weights_tK,
        )
        part.deadline_s = time.monotonic() + owner.timeout_s
        try:
            channel.send(part.frame)
        except HostLost as error:
            owner.links.lose(channel, error.message)
            part.channel = None
        owner.counters.frames += 1
        owner.counters.rows += len(part.frame.rows)
        self._sent.append(part)

    def _collect(self, part: _Part) -> bool:
        """Add a part's sums; False if its host did not give them."""
        channel, frame, owner = part.channel, part.frame, self._owner
        if channel is None or frame is None:
            return False
        began = time.perf_counter()
        try:
            deadline_s = max(part.deadline_s, time.monotonic() + _GRACE_S)
            answer = checked_rows(frame, channel.receive(frame.sequence, deadline_s))
        except (HostLost, FrameError) as error:
            owner.links.lose(channel, error.message)
            return False
        finally:
            owner.counters.wait_s += time.perf_counter() - began
        if isinstance(answer, CombineFrame):
            owner.counters.host_s += answer.busy_us / 1e6
            self._add(part.rows, torch.from_numpy(answer.rows))
            return True
        if answer.reason is RefusalReason.FAILED:  # it would fail again; here the error, if any, has a cause
            owner.counters.fallbacks += 1
            self._compute_here(part)
            return True
        if answer.reason is RefusalReason.STALE_EPOCH:
            owner.links.renew(channel, _RENEW_TIMEOUT_S)
        else:
            owner.links.lose(channel, answer.message)
        return False

    def _compute_here(self, part: _Part) -> None:
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


def _masked(part: _Part, keep_tK: np.ndarray, none: int) -> _Part:
    """The choices of `part` where `keep_tK`, and only the rows that have one."""
    chosen: np.ndarray = np.any(keep_tK, axis=1)
    index = np.flatnonzero(chosen)
    if len(index) == len(chosen):
        rows, keep, ids, weights = part.rows, keep_tK, part.ids_tK, part.weights_tK
    else:
        rows = index if part.rows is None else part.rows[index]
        keep, ids, weights = keep_tK[index], part.ids_tK[index], part.weights_tK[index]
    return _Part(rows, np.where(keep, ids, none), np.where(keep, weights, np.float32(0.0)))


def _as_wire(x_TD: Tensor) -> np.ndarray:
    return x_TD.view(torch.uint16).numpy() if x_TD.dtype == torch.bfloat16 else x_TD.numpy()
