"""What an engine consists of, for whoever looks into it: status, statistics, traces, benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from actors.engine.engine import Engine
from actors.expert_client.host_connections import HostConnections
from actors.experts.backend import ExpertBackend
from actors.experts.dispatch import Dispatcher
from actors.experts.memory.store import ExpertStore
from actors.experts.policy_runner import PolicyRunner
from actors.gates.activation_recorder import ActivationRecorder
from actors.weights.expert_layout import ExpertLayout
from cluster.node_memory.leases import MemoryLease


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """The engine and what status and statistics look at.

    backend None: no experts in this process. policy_runner None: its memory hears no gates.
    problems: what is odd about the checkpoint, in words.
    """

    engine: Engine
    dispatcher: Dispatcher
    recorder: ActivationRecorder
    backend: ExpertBackend | None
    policy_runner: PolicyRunner | None
    links: HostConnections | None
    layout: ExpertLayout
    top_k: int
    kernel: str
    dtype: torch.dtype
    lease: MemoryLease
    problems: tuple[str, ...] = ()

    @property
    def store(self) -> ExpertStore:
        """This process's expert memory; only where there is one."""
        assert self.backend is not None, "no experts in this process"
        return self.backend.store
