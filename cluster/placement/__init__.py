"""Which expert host owns which experts, and which replica computes what. Pure: no clock, no I/O, no randomness."""

from cluster.placement.cost import PhaseLoad, PlacementHost, Regime
from cluster.placement.even import even_placement
from cluster.placement.forecast import forecast, persistence
from cluster.placement.inputs import PlacementInputs
from cluster.placement.planner import plan_placement

__all__ = [
    "PhaseLoad",
    "PlacementHost",
    "PlacementInputs",
    "Regime",
    "even_placement",
    "forecast",
    "persistence",
    "plan_placement",
]
