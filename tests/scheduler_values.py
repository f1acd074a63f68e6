"""Reports and knowledge of tests: small, and everything that a test does not care about filled in."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.semantics.knowledge import Knowledge
from cluster.status.reports import HostReport, WorkerReport
from cluster.types import GenerationRequest, RequestId, SamplingParams, StartupPhase

LAYERS, NUM_EXPERTS, TOP_K = (0, 1), 4, 2


def bits(*experts: int) -> bytes:
    """Residency of these flat indices."""
    present = np.zeros(len(LAYERS) * NUM_EXPERTS, dtype=np.bool_)
    present[list(experts)] = True
    return np.packbits(present).tobytes()


def worker_report(worker_id: str = "w0", **values: Any) -> WorkerReport:
    """A ready worker with nothing to do."""
    facts: dict[str, Any] = {
        "worker_id": worker_id,
        "replica_id": f"replica-{worker_id}",
        "node_id": "node-a",
        "phase": StartupPhase.READY,
        "layers": LAYERS,
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "max_open": 8,
        "step_s": 0.01,
        "prefill_token_s": 0.001,
    }
    return WorkerReport(**facts | values)


def host_report(index: int = 0, **values: Any) -> HostReport:
    """A ready host with room for all experts."""
    facts: dict[str, Any] = {
        "host_id": f"host-{index}-1",
        "index": index,
        "node_id": "node-a",
        "phase": StartupPhase.READY,
        "epochs": (1,),
        "capacity": len(LAYERS) * NUM_EXPERTS,
        "expert_bytes": 1000,
    }
    return HostReport(**facts | values)


def knowledge(version: int = 1, *, centroids: np.ndarray | None = None, uses: np.ndarray | None = None) -> Knowledge:
    """Two kinds of prompt, told apart by the first two numbers; the first uses the lower half of the experts."""
    shape = (2, len(LAYERS), NUM_EXPERTS)
    if uses is None:
        uses = np.zeros(shape, dtype=np.float32)
        uses[0, :, : NUM_EXPERTS // 2] = uses[1, :, NUM_EXPERTS // 2 :] = 1.0
    if centroids is None:
        centroids = np.eye(2, dtype=np.float32)
    return Knowledge(
        version=version,
        clusters_version=1,
        layers=LAYERS,
        centroids=centroids,
        uses=uses,
        prior=uses.mean(axis=0),
        support=np.full(2, 100.0, dtype=np.float32),
        mutual_information=1.0,
    )


def generation(request_id: str = "r", *, embedding: bytes = b"", avoid: tuple[str, ...] = ()) -> GenerationRequest:
    """A short request."""
    return GenerationRequest(
        request_id=RequestId(request_id),
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=16),
        embedding=embedding,
        avoid=avoid,
    )
