"""Something that learns one number, for tests of how policy state travels."""

from __future__ import annotations

import numpy as np

from cluster.errors import ConfigError
from cluster.policies.policy_state import NUM_LEARNED, Arrays, StatefulPolicy
from cluster.stats.policy_state_loop import Answer, StatefulPolicies


class LearnedMean:
    """A mean of what it was shown: a `StatefulPolicy`."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.num_seen = 0

    def learn(self, value: float, times: int = 1) -> None:
        self.mean = (self.mean * self.num_seen + value * times) / (self.num_seen + times)
        self.num_seen += times

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {"mean": np.array([self.mean]), NUM_LEARNED: np.array(self.num_seen)}

    def load_arrays(self, arrays: Arrays) -> None:
        if "mean" not in arrays:
            raise ConfigError(f"no mean in {sorted(arrays)}")
        if arrays[NUM_LEARNED]:
            self.learn(float(arrays["mean"][0]), int(arrays[NUM_LEARNED]))


def states_of(**parts: StatefulPolicy) -> StatefulPolicies:
    """Parts that answer on the asking thread."""

    def ask(question: object, _timeout_s: float) -> Answer:
        assert callable(question)
        return question()

    return StatefulPolicies(parts, ask)
