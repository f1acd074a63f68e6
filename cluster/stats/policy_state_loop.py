"""The policy state loop: what a worker learned goes to a file and, now and then, to the other workers.

Off the token path. Knows groups of arrays, a file and a store; knows nothing of policies. A store that is away costs
a fresh worker its warm start and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from cluster.errors import ConfigError
from cluster.logs import log_event
from cluster.periodic import Pace, PeriodicLoop
from cluster.policies.policy_state import (
    Groups,
    StatefulPolicy,
    check_finite,
    check_policy_state,
    load_policy_state,
    num_learned,
    pack_share,
    save_policy_state,
    unpack_share,
)
from cluster.protocols import StateStore

_LOG = logging.getLogger(__name__)
_INTERVAL_S = 30.0
_REPEAT_S = 3600.0  # what did not change is sent again: servers restart, and forget what is a day old
_WARM_UP_S = 2.0
_MAX_CPU_SHARE = 0.005  # of one core: what takes long to pack is sent less often
_ANSWER_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_MAX_MERGED = 3  # shares that a fresh worker takes in: who learned most had taken in others itself

Answer: TypeAlias = dict[str, dict[str, np.ndarray]]
Ask: TypeAlias = Callable[[Callable[[], Answer], float], Answer]


class PolicyStates(Protocol):
    """Everything that learns in a worker, by name of its group. Safe to call from any thread while it learns."""

    def snapshot(self) -> Groups:
        """Independent copies."""
        ...

    def load(self, groups: Groups) -> None:
        """Take in states, merged with what is there; groups of names that nothing here has are ignored.

        Raises:
            ConfigError: a group does not fit the model.
        """
        ...


class StatefulPolicies:
    """The `PolicyStates` of parts that live on a thread of their own."""

    def __init__(self, parts: Mapping[str, StatefulPolicy], ask: Ask) -> None:
        """Args: ask: has a question answered on that thread, within seconds, or raises TimeoutError."""
        self._parts = parts
        self._ask = ask

    def snapshot(self) -> Groups:
        """What `PolicyStates.snapshot` says; a group that is not finite is neither kept nor told to anybody.

        Raises:
            TimeoutError: the thread did not answer.
        """
        groups = self._ask(lambda: {name: part.to_arrays() for name, part in self._parts.items()}, _ANSWER_TIMEOUT_S)
        return {name: arrays for name, arrays in groups.items() if _is_finite(name, arrays)}

    def load(self, groups: Groups) -> None:
        """What `PolicyStates.load` says, and TimeoutError."""
        errors: list[ConfigError] = []

        def take_in() -> Answer:
            try:
                for name in groups.keys() & self._parts.keys():
                    check_finite(groups[name], f"policy state of {name}")
                    self._parts[name].load_arrays(groups[name])
            except ConfigError as error:  # not on that thread, which has to go on
                errors.append(error)
            return {}

        self._ask(take_in, _ANSWER_TIMEOUT_S)
        if errors:
            raise errors[0]


def _is_finite(name: str, arrays: Mapping[str, np.ndarray]) -> bool:
    try:
        check_finite(arrays, f"policy state of {name}")
    except ConfigError as error:
        log_event(_LOG, logging.WARNING, "policy state was left out", reason=error.message)
        return False
    return True


class PolicyStateLoop:
    """Starts one worker warm and keeps what it learns. `num_published` shares since start."""

    def __init__(
        self,
        store: StateStore,
        fingerprint: str,
        owner: str,
        path: Path | None = None,
        *,
        interval_s: float = _INTERVAL_S,
        repeat_s: float = _REPEAT_S,
        warm_up_s: float = _WARM_UP_S,
    ) -> None:
        """Args: owner: the worker's id. path: file to start from and to save to at the end."""
        self.num_published = 0
        self._store = store
        self._fingerprint = fingerprint
        self._owner = owner
        self._path = path
        self._interval_s = interval_s
        self._repeat_s = repeat_s
        self._warm_up_s = warm_up_s
        self._states: PolicyStates | None = None
        self._loop: PeriodicLoop | None = None
        self._warm = threading.Event()
        self._taking_in = threading.Lock()
        self._is_serving = False
        self._published: dict[str, tuple[int, float]] = {}  # how much had gone into a group when it was sent, and when
        self._refused: dict[str, str] = {}

    @property
    def degraded(self) -> tuple[str, ...]:
        """What is not shared, in words."""
        return tuple(f"policy state is not shared: {reason}" for reason in self._refused.values())

    def start(self, states: PolicyStates) -> None:
        """Take in the file, then what others learned; of that, what comes too late is left. No step runs yet.

        Raises:
            ConfigError: the file is damaged or of another model, or cannot be saved to.
        """
        if self._path is not None:
            check_policy_state(self._path, self._fingerprint)
            if self._path.exists():
                states.load(load_policy_state(self._path, self._fingerprint))
        self._states = states
        pace = Pace(
            "policy state",
            interval_s=self._interval_s,
            expected=(ConnectionError, TimeoutError),
            event="policy state was not shared",
        )
        self._loop = PeriodicLoop(lambda: self._share(states), pace, max_cpu_share=_MAX_CPU_SHARE, ends_with_turn=True)
        self._loop.start()
        self._warm.wait(self._warm_up_s)
        with self._taking_in:  # a share half taken in is waited for: what learns must not change within a step
            self._is_serving = True

    def stop(self) -> None:
        """Share and save what was learned; call it while the states still answer."""
        if self._loop is not None:
            self._loop.stop(_STOP_TIMEOUT_S)
        if self._states is not None and self._path is not None:
            self._save(self._states, self._path)
        self._states = None

    def _share(self, states: PolicyStates) -> None:
        """Take in what others learned, at first; after that, publish what was learned here."""
        if self._warm.is_set():
            self._publish(states)
            return
        try:
            self._take_in_shares(states)
        except Exception as error:  # noqa: BLE001 - the start is cold, serving must go on
            log_event(_LOG, logging.WARNING, "not all was learned that others know", reason=repr(error))
        finally:
            self._warm.set()

    def _take_in_shares(self, states: PolicyStates) -> None:
        for name, arrays in states.snapshot().items():
            shares = [share for share in self._store.read_policy_states(self._fingerprint, name) if share.weight]
            shares.sort(key=lambda share: share.weight, reverse=True)
            for share in shares[:_MAX_MERGED]:
                try:
                    arrays_of_other = unpack_share(share.blob, self._fingerprint, name)
                    with self._taking_in:
                        if self._is_serving:
                            raise TimeoutError(f"nothing came within {self._warm_up_s:g} s")
                        states.load({name: arrays_of_other})
                except ConfigError as error:  # of a worker of another version of this program
                    log_event(_LOG, logging.WARNING, "a share was left", owner=share.owner, reason=error.message)
            if not num_learned(arrays):  # others know all that is here; not so what a file told
                self._published[name] = (num_learned(states.snapshot()[name]), time.monotonic())

    def _publish(self, states: PolicyStates) -> None:
        """Send the groups into which something went since they were last sent, and now and then the others."""
        if not self._store.is_shared:
            return
        for name, arrays in states.snapshot().items():
            weight, now_s = num_learned(arrays), time.monotonic()
            sent, sent_s = self._published.get(name, (0, now_s))
            if name in self._refused or not weight or (weight == sent and now_s < sent_s + self._repeat_s):
                continue
            blob = pack_share(self._fingerprint, name, arrays)
            try:
                self._store.publish_policy_state(self._fingerprint, name, self._owner, blob, weight)
            except ValueError as error:  # too large, and it will not become smaller
                self._refused[name] = str(error)
                log_event(_LOG, logging.WARNING, "policy state is not shared", reason=str(error))
                continue
            self._published[name] = (weight, now_s)
            self.num_published += 1

    def _save(self, states: PolicyStates, path: Path) -> None:
        try:
            groups = dict(states.snapshot())
            if path.exists():  # what other policies had learned stays
                groups = load_policy_state(path, self._fingerprint) | groups
            save_policy_state(path, self._fingerprint, groups)
        except Exception as error:  # noqa: BLE001 - the end of a worker: a full disk must not keep it from ending
            log_event(_LOG, logging.WARNING, "policy state was not saved", path=str(path), reason=str(error))
