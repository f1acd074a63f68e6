"""Reduces a model's token-embedding table to at most 64 dimensions, int8, reading the checkpoint's file without torch.

PCA on sampled rows (randomised range finder: Halko, Martinsson and Tropp 2011, algorithm 4.4), in float64 and with a
fixed sign of every component, so that front ends on different machines get the same table. Memory: the sample
(at most 128 MiB), a block of rows, and the result.

Shapes: V tokens of the vocabulary, D model dim, P dimensions kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import CheckpointError
from cluster.semantics.embedding import MAX_DIMS, TokenEmbeddings

_SAMPLE_VALUES = 16 * 2**20
_BLOCK_VALUES = 4 * 2**20
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True, slots=True)
class StoredTable:
    """A matrix [V, D] as it lies in a file: row-major from `offset` on, in safetensors' name of its type."""

    file: Path
    offset: int
    num_rows: int
    num_columns: int
    dtype: str

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, D) float32.

        Raises:
            CheckpointError: a type other than float32, float16 and bfloat16, or a file too short.
        """
        if self.dtype not in _STORED:
            raise CheckpointError(f"{self.file}: token embeddings of type {self.dtype}; {', '.join(_STORED)} are read")
        stored = _STORED[self.dtype]
        num = (stop - start) * self.num_columns
        at = self.offset + start * self.num_columns * stored.itemsize
        try:
            values = np.fromfile(self.file, dtype=stored, count=num, offset=at)
        except OSError as error:
            raise CheckpointError(f"{self.file}: {error}") from error
        if len(values) != num:
            raise CheckpointError(f"{self.file}: ends before byte {at + num * stored.itemsize}")
        if self.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False).reshape(stop - start, self.num_columns)


def reduce_table(table: StoredTable, num_dims: int = MAX_DIMS) -> TokenEmbeddings:
    """The table on its `num_dims` widest directions (fewer where it has fewer), each with a scale of its own.

    Raises:
        CheckpointError: the table cannot be read, or has no row whose numbers are finite. Single rows that are not
            finite mean nothing: prompts are embedded by their other tokens.
    """
    sample = _sample(table)
    sample = sample[np.isfinite(sample).all(axis=1)]
    if not len(sample):
        raise CheckpointError(f"{table.file}: token embeddings that are not finite")
    mean, basis_DP = _principal_directions(sample, num_dims)
    reduced = np.concatenate([((rows - mean) @ basis_DP).astype(np.float32) for rows in _blocks(table)])
    reduced = np.nan_to_num(reduced, posinf=0.0, neginf=0.0)  # a few rows of a large vocabulary may be anything
    scale_P = np.maximum(np.abs(reduced).max(axis=0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    return TokenEmbeddings(np.rint(reduced / scale_P).astype(np.int8), scale_P)


def _sample(table: StoredTable) -> np.ndarray:
    """(N, D) float64: rows evenly spread over the table, as many as fit the memory for them."""
    wanted = min(table.num_rows, max(_SAMPLE_VALUES // table.num_columns, 2 * MAX_DIMS))
    places = np.unique(np.linspace(0, table.num_rows - 1, wanted).astype(np.int64))
    step = max(1, _BLOCK_VALUES // table.num_columns)
    parts: list[np.ndarray] = []
    for start in range(0, table.num_rows, step):
        inside = places[(places >= start) & (places < start + step)]
        if len(inside):
            parts.append(table.rows(int(inside[0]), int(inside[-1]) + 1)[inside - inside[0]])
    return np.concatenate(parts).astype(np.float64)


def _blocks(table: StoredTable) -> Iterator[np.ndarray]:
    step = max(1, _BLOCK_VALUES // table.num_columns)
    for start in range(0, table.num_rows, step):
        yield table.rows(start, min(start + step, table.num_rows))


def _principal_directions(sample_ND: np.ndarray, num_dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and the widest directions (D, P), widest first."""
    mean = sample_ND.mean(axis=0)
    centred = np.subtract(sample_ND, mean, out=sample_ND)
    num_dims = min(num_dims, *centred.shape)
    rank = min(num_dims + _OVERSAMPLING, *centred.shape)
    probe = np.random.default_rng(0).standard_normal((centred.shape[1], rank))
    range_NR = np.linalg.qr(centred @ probe)[0]
    for _ in range(_POWER_ITERATIONS):
        range_NR = np.linalg.qr(centred @ np.linalg.qr(centred.T @ range_NR)[0])[0]
    directions = np.linalg.svd(range_NR.T @ centred, full_matrices=False)[2][:num_dims]
    largest = directions[np.arange(num_dims), np.abs(directions).argmax(axis=1)]
    return mean, (directions * np.where(largest < 0, -1.0, 1.0)[:, None]).T
