"""The file of a gate trace, and what can be taken from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from trace_builders import clustered_trace, trace_of

from cluster.errors import InvalidRequest
from cluster.policies.trace import load_trace


def test_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    trace = clustered_trace(num_requests=3, num_rows=4, seed=1)

    trace.save(tmp_path / "t.npz")
    loaded = load_trace(tmp_path / "t.npz")

    assert loaded.model == trace.model and loaded.requests == trace.requests
    for name in ("row_starts", "tokens", "steps", "is_decode", "probs", "chosen", "ahead", "vocab", "embeddings"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(trace, name))
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_selected_requests_keep_their_rows_and_embeddings() -> None:
    trace = clustered_trace(num_requests=4, num_rows=3, seed=2)

    part = trace.select([2, 0])

    assert [r.request_id for r in part.requests] == ["2", "0"]
    np.testing.assert_array_equal(part.rows_of(0).probs, trace.rows_of(2).probs)
    np.testing.assert_array_equal(part.rows_of(1).vectors, trace.rows_of(0).vectors)


def test_rows_of_a_prefill_chunk_are_one_step() -> None:
    trace = trace_of([[[[0]], [[1]], [[2]], [[3]], [[0]]]], num_experts=4, num_prefill=3)

    assert list(trace.rows_of(0).step_slices()) == [slice(0, 3), slice(3, 4), slice(4, 5)]


def test_shuffled_trace_keeps_how_often_experts_are_used_and_nothing_else() -> None:
    trace = clustered_trace(num_requests=8, num_rows=25, seed=3)

    null = trace.shuffled(seed=0)

    for layer in range(len(trace.model.layers)):
        counts = [np.bincount(t.chosen[:, layer].ravel(), minlength=16) for t in (trace, null)]
        np.testing.assert_array_equal(*counts)
        rows = [np.sort(t.probs[:, layer].sum(axis=1, dtype=np.float32)) for t in (trace, null)]
        np.testing.assert_array_equal(*rows)
    of_chosen = np.take_along_axis(null.probs, null.chosen.astype(np.int64), axis=2)
    np.testing.assert_array_equal(of_chosen, -np.sort(-null.probs, axis=2)[:, :, :2])
    assert _explained(trace.tokens, trace.chosen[:, 0, 0]) > 0.9
    assert _explained(null.tokens, null.chosen[:, 0, 0]) < 0.6
    assert _explained(trace.chosen[:, 0, 0], trace.chosen[:, 1, 0]) > 0.5
    assert _explained(null.chosen[:, 0, 0], null.chosen[:, 1, 0]) < 0.35
    np.testing.assert_array_equal(trace.shuffled(seed=0).chosen, null.chosen)


def _explained(causes: np.ndarray, effects: np.ndarray) -> float:
    """Share of rows whose effect is the commonest one of their cause."""
    best = sum(np.bincount(effects[causes == cause]).max() for cause in np.unique(causes))
    return float(best / len(effects))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(content)

    with pytest.raises(InvalidRequest, match=r"t\.npz: not a gate trace"):
        load_trace(path)


def test_archive_without_the_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", other=np.zeros(3))

    with pytest.raises(InvalidRequest, match="not a gate trace"):
        load_trace(tmp_path / "t.npz")
