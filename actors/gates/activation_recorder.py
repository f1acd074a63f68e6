"""Counts which experts the gates choose, on the attention worker, wherever experts run: by phase, and by what kind
of prompt a row belongs to.

Knows gate choices, phases of rows and clusters of prompts; knows nothing of stores. The engine's thread adds, other
threads may read at any time: a value read is at most a few steps old.

Shapes: T real token rows, K experts per token (top-k), L MoE layers, E experts of a layer, C clusters of prompts and
one more for prompts of none, 2 phases in the order of `Phase`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from actors.kernels.native import NativeKernels
from cluster.semantics.clusters import nearest_cluster
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, MASS, ExpertStatistics, no_statistics
from cluster.types import Phase

if TYPE_CHECKING:
    from actors.gates.work import ExpertWork  # which counts with this module

_MAX_PROMPTS = 32  # embeddings kept between two looks: a fair sample of those that came
_MAX_STEPS, _FEW_ROWS = 8, 64  # so many steps are counted together, if they have no more rows than that

_Choices: TypeAlias = tuple[int, Tensor, Tensor, Tensor | None, int, int]
"""Layer, choices and weights [T, K], clusters [T], real rows, how many decode: kept until they are counted."""


class ActivationRecorder:
    """Activations by layer, phase and expert since start; and by cluster of prompts since there are these clusters."""

    def __init__(self, layers: Iterable[int], num_experts: int, native: NativeKernels | None) -> None:
        """Args: native: None counts with numpy."""
        self._native = native
        self._layers = tuple(layers)
        self._row_of = {layer: row for row, layer in enumerate(self._layers)}
        self._totals_L2E = torch.zeros(len(self._layers), len(Phase), num_experts, dtype=torch.int64)
        self._centroids = np.empty((0, 0), dtype=np.float32)
        self._statistics = no_statistics(0, 0, self._layers, num_experts)
        self._pending: list[_Choices] = []
        self._kept: int | None = None  # of those pending, what was there before the step under way; None between steps
        self._prompts: list[bytes] = []
        self._num_prompts = 0
        self._prompting = threading.Lock()  # the engine's thread adds prompts, another one takes them

    @property
    def counts(self) -> dict[int, np.ndarray]:
        """(2, E) int64 by layer; the recorder's own arrays, which grow every few steps."""
        return dict(zip(self._layers, self._totals_L2E.numpy(), strict=True))

    @property
    def statistics(self) -> ExpertStatistics:
        """By the present clusters; the recorder's own array, which grows. Another object after `set_knowledge`."""
        return self._statistics

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """Count by these clusters from now on. Between two steps; rows of known sequences need `cluster_of` again."""
        self.settle()
        if knowledge.clusters_version == self._statistics.clusters_version:
            return
        self._centroids = knowledge.centroids
        num_experts = self._statistics.num_experts
        self._statistics = no_statistics(
            knowledge.clusters_version, len(knowledge.centroids), self._layers, num_experts
        )

    def cluster_of(self, embedding: bytes) -> int:
        """The cluster of a prompt; -1 without one."""
        return nearest_cluster(self._centroids, embedding)

    def take_in(self, embedding: bytes) -> int:
        """The cluster of a new prompt, which may be told to those who learn clusters."""
        if embedding:
            with self._prompting:
                self._num_prompts += 1
                if len(self._prompts) < _MAX_PROMPTS:
                    self._prompts.append(embedding)
                elif (place := random.randrange(self._num_prompts)) < _MAX_PROMPTS:
                    self._prompts[place] = embedding
        return self.cluster_of(embedding)

    def drain_prompts(self) -> list[bytes]:
        """A sample of the prompts that were taken in since the last call."""
        with self._prompting:
            prompts, self._prompts, self._num_prompts = self._prompts, [], 0
        return prompts

    def begin(self) -> None:
        """A step begins: what is recorded from here on counts when it is over, or not at all."""
        self._kept = len(self._pending)

    def end(self, *, is_whole: bool) -> None:
        """The step is over. Args: is_whole: not broken off; one that was is computed again, and counted then."""
        if not is_whole:
            del self._pending[self._kept :]
        self._kept = None
        self._settle_if_many()

    def record(self, work: ExpertWork, num_rows: int, num_decode: int) -> None:
        """Add one layer's choices. Args: num_decode: so many rows decode, the rest of the first `num_rows` prefill."""
        ids_TK, weights_TK = work.topk_ids_TK, work.topk_weights_TK  # not the rows: they are too much to keep
        self._pending.append((work.layer, ids_TK, weights_TK, work.clusters_T, num_rows, num_decode))
        if self._kept is None:
            self._settle_if_many()

    def _settle_if_many(self) -> None:
        if self._pending:
            num_rows = self._pending[-1][4]
            if len(self._pending) >= len(self._layers) * (_MAX_STEPS if num_rows <= _FEW_ROWS else 1):
                self.settle()

    def settle(self) -> None:
        """Count what was recorded. Every few steps, and when the engine has nothing to do: between two layers, or after
        each step, this code would run cold, five times as slow."""
        pending, self._pending = self._pending, []
        for _, alike in groupby(pending, key=lambda choices: (id(choices[3]), choices[4], choices[5])):
            self._count(list(alike))

    def _count(self, layers: list[_Choices]) -> None:
        """Args: layers: of the same rows."""
        _, _, _, clusters, num_rows, num_decode = layers[0]
        if not num_rows:
            return
        rows = [self._row_of[choices[0]] for choices in layers]
        ids = [choices[1].contiguous() for choices in layers]
        weights = [choices[2].contiguous() for choices in layers]
        if self._native is not None:
            values = torch.from_numpy(self._statistics.values)
            self._native.count_choices(
                rows, ids, weights, clusters, self._totals_L2E, values, num_rows=num_rows, num_decode=num_decode
            )
            return
        for row, ids_TK, weights_TK in zip(rows, ids, weights, strict=True):
            self._count_layer(row, ids_TK[:num_rows], weights_TK[:num_rows], clusters, num_decode)

    def _count_layer(
        self, row: int, ids_TK: Tensor, weights_TK: Tensor, clusters_T: Tensor | None, num_decode: int
    ) -> None:
        """The definition of what `count_choices` does."""
        shape = ids_TK.shape
        phases = np.broadcast_to((np.arange(shape[0]) < num_decode).astype(np.int64)[:, None], shape)
        of_rows = np.full(shape[0], -1) if clusters_T is None else clusters_T[: shape[0]].numpy()
        clusters = np.broadcast_to(of_rows[:, None], shape)
        ids = ids_TK.numpy()
        np.add.at(self._totals_L2E.numpy()[row], (phases, ids), 1)
        of_layer = self._statistics.values[:, :, row]
        np.add.at(of_layer[..., COUNT], (clusters, phases, ids), 1)
        np.add.at(of_layer[..., MASS], (clusters, phases, ids), weights_TK.double().numpy())
