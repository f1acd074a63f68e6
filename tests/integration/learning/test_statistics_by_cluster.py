"""An engine counts every row for the cluster of its own prompt, whoever shares the step, also after new knowledge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from identity import engine_parts
from model_builders import NUM_EXPERTS, TOP_K, build_checkpoint

from actors.engine.loaded_engine import LoadedEngine
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, DECODE, MASS, PREFILL
from cluster.types import GenerationRequest, RequestId, SamplingParams

pytestmark = pytest.mark.slow

PROMPTS = [(5, 6, 7, 8, 9), (11,), (20, 21, 22), (5, 30, 31, 32, 33, 34)]
CLUSTERS = [0, 1, -1, 1]  # of the prompts
NUM_TOKENS = 6


def _embedding(cluster: int) -> bytes:
    return b"" if cluster < 0 else (np.eye(2) * 127).astype(np.int8)[cluster].tobytes()


def _knowledge(parts: LoadedEngine, version: int, *, swapped: bool = False) -> Knowledge:
    layers = tuple(parts.recorder.counts)
    uses = np.full((2, len(layers), NUM_EXPERTS), TOP_K / NUM_EXPERTS, dtype=np.float32)
    return Knowledge(
        version=version,
        clusters_version=version,
        layers=layers,
        centroids=np.eye(2, dtype=np.float32)[:: -1 if swapped else 1],
        uses=uses,
        prior=uses[0],
        support=np.zeros(2, dtype=np.float32),
        mutual_information=0.0,
    )


def _add(parts: LoadedEngine) -> None:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for i, (prompt, cluster) in enumerate(zip(PROMPTS, CLUSTERS, strict=True)):
        parts.engine.add(
            GenerationRequest(
                request_id=RequestId(str(i)), prompt_ids=prompt, sampling=sampling, embedding=_embedding(cluster)
            )
        )


def _rows(parts: LoadedEngine) -> np.ndarray:
    """[3 clusters, 2 phases] rows behind the counts, the same for every layer."""
    parts.recorder.settle()
    by_layer = parts.recorder.statistics.values[..., COUNT].sum(axis=3) / TOP_K
    assert (by_layer == by_layer[:, :, :1]).all()
    return by_layer[:, :, 0]


@pytest.mark.parametrize("max_batch_tokens", [4, 64])
def test_rows_count_for_their_own_prompts_clusters(max_batch_tokens: int, tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / "m", "qwen3_moe")
    with engine_parts(path, max_batch_tokens=max_batch_tokens) as parts:
        parts.engine.set_knowledge(_knowledge(parts, 1))
        _add(parts)
        while parts.engine.has_work:
            parts.engine.step()

        rows = _rows(parts)
        for cluster in (0, 1, -1):
            of_cluster = [prompt for prompt, own in zip(PROMPTS, CLUSTERS, strict=True) if own == cluster]
            assert rows[cluster, DECODE] == (NUM_TOKENS - 1) * len(of_cluster)
            assert rows[cluster, PREFILL] == sum(map(len, of_cluster))
        statistics = parts.recorder.statistics
        totals = np.stack(list(parts.recorder.counts.values()), axis=1)
        np.testing.assert_array_equal(statistics.values[..., COUNT].sum(axis=0), totals)
        # This family's routing weights sum to one in every row.
        np.testing.assert_allclose(statistics.values[..., MASS].sum(axis=3)[:, :, 0], rows, rtol=1e-3)
        assert sorted(parts.recorder.drain_prompts()) == sorted(_embedding(own) for own in CLUSTERS if own >= 0)


def test_new_knowledge_counts_for_sequences_under_way(tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / "m", "qwen3_moe")
    with engine_parts(path) as parts:
        parts.engine.set_knowledge(_knowledge(parts, 1))
        _add(parts)
        parts.engine.step()
        before = _rows(parts)
        parts.engine.set_knowledge(_knowledge(parts, 2, swapped=True))
        while parts.engine.has_work:
            parts.engine.step()

        assert before[:, PREFILL].sum() == sum(map(len, PROMPTS)) and not before[:, DECODE].any()
        after = _rows(parts)
        assert after[:, DECODE].tolist() == [2 * (NUM_TOKENS - 1), NUM_TOKENS - 1, NUM_TOKENS - 1]
        assert not after[:, PREFILL].any()
