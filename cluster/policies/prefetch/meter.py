"""Measures what a predictor that prices prefetch asks for: the same in virtual time and by the clock."""

from __future__ import annotations

from cluster.policies.prefetch.moesaic import LinkCosts

_RATE = 0.02


class CostMeter:
    """Moving averages over layers of compute time and of the share of time in which the link holds up the steps.

    load_s: one expert over the link, cpu_s: processor time of that, gives_way: see LinkCosts; whoever knows them sets
    them.
    """

    def __init__(self, *, load_s: float, layer_s: float) -> None:
        """Args: layer_s: a first guess of a layer's compute time."""
        self.load_s = load_s
        self.cpu_s = 0.0
        self.gives_way = True
        self._layer_s = layer_s
        self._demand_s = 0.0
        self._took_s = layer_s
        self._rate = 1.0

    def note_layer(self, *, compute_s: float, demand_s: float, took_s: float) -> None:
        """A layer computed for `compute_s`, demand loads held the link for `demand_s`, all of it took `took_s`."""
        self._layer_s += self._rate * (compute_s - self._layer_s)
        self._demand_s += self._rate * (demand_s - self._demand_s)
        self._took_s += self._rate * (took_s - self._took_s)
        self._rate = max(self._rate / (1 + self._rate), _RATE)  # the mean of all as long as they are few

    @property
    def waited(self) -> float:
        """Share of the time in which steps wait for experts, 0 to 1."""
        return 1 - self._layer_s / self._took_s

    def costs(self) -> LinkCosts:
        """What was measured so far."""
        # A saturated link is busy also with what is fetched ahead: then steps wait most of the time.
        busy = min(max(self._demand_s / self._took_s, self.waited), 1.0)
        return LinkCosts(
            load_s=self.load_s, layer_s=self._layer_s, busy=busy, cpu_s=self.cpu_s, gives_way=self.gives_way
        )
