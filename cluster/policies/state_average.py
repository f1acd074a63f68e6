"""Averages what two have learned, array by array, by how much went into each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cluster.errors import ConfigError
from cluster.policies.policy_state import NUM_LEARNED


def average_in(live: Mapping[str, np.ndarray], num_learned: int, given: Mapping[str, np.ndarray]) -> int:
    """Move the live arrays towards the given ones; how much went into both together.

    Raises:
        ConfigError: fields are missing or of other shapes; nothing was changed.
    """
    missing = [name for name in (NUM_LEARNED, *live) if name not in given]
    if missing:
        raise ConfigError(
            f"learned estimate without {', '.join(missing)}, only {', '.join(given) or 'nothing'}; "
            "start without the stored state"
        )
    for name, array in live.items():
        if given[name].shape != array.shape:
            raise ConfigError(
                f"learned estimate: {name} is of shape {given[name].shape}, the model and settings here need "
                f"{array.shape}; start without the stored state"
            )
    num_given = max(int(given[NUM_LEARNED]), 0)
    share = np.float32(num_given / max(num_learned + num_given, 1))
    for name, array in live.items():
        array += share * (given[name].astype(np.float32) - array)
    return num_learned + num_given
