"""A worker's own expert memory beside expert hosts: what is here is not sent away, what nobody else has is read here.

It fills itself with the experts that are used most, in the background. With a budget of zero there is none,
until a host is lost: then room for one token's experts is taken while that lasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from actors.experts.backend import ExpertBackend
from actors.gates.activation_recorder import ActivationRecorder
from cluster.types import ExpertId

_WORTH = 1.25  # an expert must be used this much more than the one it replaces: loads are not free
_UNUSED_S = 1.0  # after which the room for what hosts did not compute is given back
_READ_S = 0.02  # of one expert, until it was measured


class LocalMemory:
    """Experts in this process, or none."""

    def __init__(
        self,
        backend: ExpertBackend | None,
        make_fallback: Callable[[], ExpertBackend],
        recorder: ActivationRecorder,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: make_fallback: the smallest backend that can run any expert from the checkpoint."""
        self.backend = backend
        self.fallback: ExpertBackend | None = None
        self._make_fallback = make_fallback
        self._clock = clock
        self._used_s = 0.0
        self._expert_s = _READ_S
        self._counts = recorder.counts

    def resident(self, layer: int) -> np.ndarray | None:
        """(num_experts,) bool: which experts are here now; None if there is no room at all."""
        if self.backend is None:
            return None
        return self.backend.store.resident(layer)

    def partial_sums(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Float32 sums of any experts, resident or not (then read from the checkpoint)."""
        backend = self.backend or self.fallback
        if backend is None:
            backend = self.fallback = self._make_fallback()
        self._used_s = self._clock()
        return backend.partial_sums(layer, x_TD, ids_TK, weights_TK, torch.float32)

    def read_s(self, num_experts: int) -> float:
        """What it takes to read so many experts here, as far as that was measured."""
        backend = self.backend or self.fallback
        if backend is not None:
            self._expert_s = backend.store.load_s() or self._expert_s
        return num_experts * self._expert_s

    def release_unused(self) -> None:
        """Give back what was taken for a host's experts, if it was not needed for a while."""
        if self._clock() - self._used_s > _UNUSED_S:
            self.release_fallback()

    def release_fallback(self) -> None:
        """Give back what was taken while a host was away."""
        if self.fallback is not None:
            self.fallback.store.close()
            self.fallback = None

    def admit(self, layer: int, experts: np.ndarray) -> None:
        """Consider experts that were just computed elsewhere: the most used may come here, in the background."""
        if self.backend is None or not len(experts):
            return
        counts = self._counts[layer].sum(axis=0)
        best = int(experts[np.argmax(counts[experts])])
        used = float(counts[best])
        store = self.backend.store
        store.prefetch(ExpertId(layer, best), replaces=lambda victim: self._used(victim) * _WORTH < used)

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self.release_fallback()
        if self.backend is not None:
            self.backend.store.close()

    def _used(self, expert: ExpertId) -> float:
        return float(self._counts[expert.layer][:, expert.expert].sum())
