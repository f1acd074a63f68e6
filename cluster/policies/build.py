"""Policies by name: "lru", "mrs", or with prediction "lru+next-gate", "eam+eam", "belady+oracle".

The one place that knows every policy and predictor; live memory and replay build through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from cluster.errors import ConfigError
from cluster.policies.base import PolicySet, Scorer
from cluster.policies.eviction.belady import BeladyScorer
from cluster.policies.eviction.eam import EamScorer
from cluster.policies.eviction.fmoe import FmoeScorer
from cluster.policies.eviction.frequency import LfuScorer, StaticScorer
from cluster.policies.eviction.lru import LruPerLayerScorer, LruScorer
from cluster.policies.eviction.moesaic import MoesaicScorer
from cluster.policies.eviction.mrs import MrsScorer
from cluster.policies.eviction.request_mix import RequestMixScorer
from cluster.policies.expert_maps.search import MapSearch
from cluster.policies.expert_maps.store import MapStore
from cluster.policies.future import Future
from cluster.policies.next_use.estimate import NextUse
from cluster.policies.next_use.kernels import NextUseKernels
from cluster.policies.policy_state import StatefulPolicy
from cluster.policies.prefetch.base import Predictor
from cluster.policies.prefetch.eam import EamPredictor
from cluster.policies.prefetch.fmoe import FmoePredictor
from cluster.policies.prefetch.moesaic import LinkCosts, MoesaicPredictor
from cluster.policies.prefetch.next_gate import NextGatePredictor
from cluster.policies.prefetch.oracle import OraclePredictor
from cluster.policies.prefetch.whole_layer import WholeLayerPredictor
from cluster.policies.request_activations import ActivationTracker
from cluster.policies.signals import Grid, SignalListener
from cluster.semantics.request_mix import RequestMix

_Listener = TypeVar("_Listener", bound=SignalListener)
_Value = TypeVar("_Value")

EVICTIONS = ("lru", "lru-per-layer", "lfu", "static", "mrs", "eam", "fmoe", "moesaic", "belady")
PREDICTIONS = ("none", "next-gate", "whole-layer", "eam", "fmoe", "moesaic", "oracle")
REPLAY_ONLY = ("belady", "oracle")
WITHOUT_GATES = ("lru", "lfu")  # evictions that need no signals of gates
PRICED = ("moesaic",)  # predictions that depend on what the link costs


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What the published policies leave open; chosen on a split of the traces that are learned from, not on what is
    reported (two thirds to learn from, a sixth to choose by: hit rates at three cache sizes, TPOT over three links).

    lfu_decay: of 1 (plain LFU) to 0.8 a step. mrs_alpha: of 0.1 to 0.3. eam_memory: of 0 (the running step alone) to 1
    (the whole request). eam_capacity: the paper's; 300 hits 0.002 more often. fmoe_distance: of 1 to 6; the paper
    takes 3, 4 or 6 by model. fmoe_capacity: of 300 to 3000; the paper takes 1000. kernels: compiled code for moesaic's
    estimate; None: numpy.
    """

    lfu_decay: float = 0.95
    mrs_alpha: float = 0.2
    eam_capacity: int = 120
    eam_memory: float = 0.5
    fmoe_capacity: int = 3000
    fmoe_distance: int = 1
    kernels: NextUseKernels | None = None

    def new_map_store(self, grid: Grid, embedding_dim: int) -> MapStore:
        """fMoE's, empty."""
        return MapStore(grid, dim=embedding_dim, capacity=self.fmoe_capacity, distance=self.fmoe_distance)

    def new_next_use(self, grid: Grid, embedding_dim: int) -> NextUse:
        """Moesaic's, having learned nothing."""
        return NextUse(grid, embedding_dim=embedding_dim, kernels=self.kernels)

    def new_tracker(self, grid: Grid) -> ActivationTracker:
        """MoE-Infinity's, without past requests."""
        return ActivationTracker(grid, capacity=self.eam_capacity, memory=self.eam_memory)


@dataclass(frozen=True, kw_only=True)
class PolicyContext:
    """What policies are built from. num_slots: experts the memory holds.

    embedding_dim: model dim. frequency: [L, E] uses in a trace, for static. map_store: filled beforehand, or None for
    an empty one of the default size. past: followed requests of a trace, or None to start without. learned: moesaic's
    estimate, or None to learn from nothing. costs: of the link, as measured, for who prices prefetch. future: in
    replay only. mix: of the worker's requests, where requests are routed by what they use, for moesaic's eviction.
    """

    grid: Grid
    num_slots: int
    embedding_dim: int
    frequency: np.ndarray | None = None
    map_store: MapStore | None = None
    past: ActivationTracker | None = None
    learned: NextUse | None = None
    costs: Callable[[], LinkCosts] | None = None
    future: Future | None = None
    mix: RequestMix | None = None
    settings: PolicySettings = PolicySettings()

    @cached_property
    def search(self) -> MapSearch:
        """fMoE's search, one for eviction and prefetch."""
        return MapSearch(self.map_store or self.settings.new_map_store(self.grid, self.embedding_dim))

    @cached_property
    def tracker(self) -> ActivationTracker:
        """MoE-Infinity's request tracking, one for eviction and prefetch."""
        return self.past or self.settings.new_tracker(self.grid)

    @cached_property
    def next_use(self) -> NextUse:
        """Moesaic's estimate, one for eviction and prefetch."""
        return self.learned or self.settings.new_next_use(self.grid, self.embedding_dim)


def build_policies(name: str, context: PolicyContext) -> PolicySet:
    """The policies of a name.

    Raises:
        ConfigError: no such policy, or it needs what the context lacks.
    """
    eviction_name, _, prediction_name = name.partition("+")
    listeners: dict[int, SignalListener] = {}
    scorer = _build_scorer(eviction_name, context, listeners)
    predictor = _build_predictor(prediction_name or "none", context, listeners)
    return PolicySet(scorer, predictor, tuple(listeners.values()), _learned(tuple(listeners.values())))


def _learned(listeners: tuple[SignalListener, ...]) -> dict[str, StatefulPolicy]:
    learned: dict[str, StatefulPolicy] = {}
    for listener in listeners:
        if isinstance(listener, MapSearch):
            learned["maps"] = listener.store
        elif isinstance(listener, NextUse):
            learned["next_use"] = listener
    return learned


def _build_scorer(name: str, context: PolicyContext, listeners: dict[int, SignalListener]) -> Scorer:
    grid, settings = context.grid, context.settings
    match name:
        case "lru":
            return LruScorer(grid.size)
        case "lru-per-layer":
            return _heard(LruPerLayerScorer(grid), listeners)
        case "lfu":
            return _heard(LfuScorer(grid, decay=settings.lfu_decay), listeners)
        case "static":
            return StaticScorer(_needed(context.frequency, name, "frequencies of a trace"))
        case "mrs":
            return _heard(MrsScorer(grid, alpha=settings.mrs_alpha), listeners)
        case "eam":
            return EamScorer(grid, _heard(context.tracker, listeners))
        case "fmoe":
            return FmoeScorer(grid, _heard(context.search, listeners))
        case "moesaic":
            scorer = MoesaicScorer(_heard(context.next_use, listeners))
            return scorer if context.mix is None else RequestMixScorer(scorer, context.mix)
        case "belady":
            return BeladyScorer(_heard(_needed(context.future, name, "the future"), listeners))
        case _:
            raise ConfigError(f"no eviction policy {name!r}; there are {', '.join(EVICTIONS)}")


def _build_predictor(name: str, context: PolicyContext, listeners: dict[int, SignalListener]) -> Predictor | None:
    grid = context.grid
    match name:
        case "none":
            return None
        case "next-gate":
            return _heard(NextGatePredictor(grid), listeners)
        case "whole-layer":
            return WholeLayerPredictor(grid)
        case "eam":
            return EamPredictor(grid, _heard(context.tracker, listeners))
        case "fmoe":
            return FmoePredictor(grid, _heard(context.search, listeners))
        case "moesaic":
            next_use = _heard(context.next_use, listeners)
            costs = _needed(context.costs, name, "the costs of the link")
            return MoesaicPredictor(grid, next_use, costs)
        case "oracle":
            future = _heard(_needed(context.future, name, "the future"), listeners)
            return OraclePredictor(grid, future, num_wanted=context.num_slots)
        case _:
            raise ConfigError(f"no predictor {name!r}; there are {', '.join(PREDICTIONS)}")


def _heard(part: _Listener, listeners: dict[int, SignalListener]) -> _Listener:
    listeners[id(part)] = part
    return part


def _needed(value: _Value | None, name: str, what: str) -> _Value:
    if value is None:
        raise ConfigError(f"policy {name} needs {what}, which is not there" + _hint(name))
    return value


def _hint(name: str) -> str:
    return "; it exists in replay only" if name in REPLAY_ONLY else "; give a trace"
