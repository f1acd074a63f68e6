"""A gate trace: what the gates said for every token of some requests, in one file.

Knows arrays and the file; knows no model, no engine, no torch. Padding never enters: a row is a token of a request.

Shapes: N token rows of all requests one after the other, L MoE layers, E experts of a layer, K experts per token
(top-k), U distinct tokens, D model dim.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import InvalidRequest

TRACE_VERSION = 1
_ARRAYS = ("row_starts", "tokens", "positions", "steps", "is_decode", "probs", "chosen", "ahead", "vocab", "embeddings")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """The model a trace is of. `layers`: decoder layer of each MoE layer. `expert_bytes`: of one expert in memory."""

    name: str
    fingerprint: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """Where a request came from."""

    request_id: str
    domain: str
    source: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of one request in the order in which they were computed; views of the trace's arrays.

    steps: number of the request's forward step that computed a row, from 0; rows of a prefill chunk share one.
    """

    request: TracedRequest
    tokens: np.ndarray
    positions: np.ndarray
    steps: np.ndarray
    is_decode: np.ndarray
    probs: np.ndarray
    chosen: np.ndarray
    ahead: np.ndarray
    vectors: np.ndarray

    def step_slices(self) -> Iterator[slice]:
        """Rows of each forward step, in order."""
        bounds = np.flatnonzero(np.diff(self.steps)) + 1
        for start, stop in zip((0, *bounds), (*bounds, len(self.steps)), strict=True):
            if stop > start:
                yield slice(int(start), int(stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class GateTrace:
    """Requests and their rows.

    row_starts: [requests + 1]. tokens, positions, steps: [N] int32. is_decode: [N] bool.
    probs: [N, L, E] float16, gate probabilities (softmax of the logits; sigmoid scores over their sum).
    chosen: [N, L, K] uint16, in gate order.
    ahead: [N, L - 1, E] float16: [:, l] is the gate of layer l + 1 applied to the input of the gate of layer l.
    vocab, embeddings: [U] int32 ascending and [U, D] float16, input embeddings of the tokens that occur.
    """

    model: TracedModel
    requests: tuple[TracedRequest, ...]
    row_starts: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    steps: np.ndarray
    is_decode: np.ndarray
    probs: np.ndarray
    chosen: np.ndarray
    ahead: np.ndarray
    vocab: np.ndarray
    embeddings: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.row_starts) == len(self.requests) + 1 and self.row_starts[-1] == len(self.tokens)
        assert len(self.probs) == len(self.chosen) == len(self.ahead) == len(self.tokens)

    def rows_of(self, index: int) -> RequestRows:
        """The rows of request `index`."""
        rows = slice(int(self.row_starts[index]), int(self.row_starts[index + 1]))
        tokens = self.tokens[rows]
        return RequestRows(
            self.requests[index],
            tokens,
            self.positions[rows],
            self.steps[rows],
            self.is_decode[rows],
            self.probs[rows],
            self.chosen[rows],
            self.ahead[rows],
            self.embeddings[np.searchsorted(self.vocab, tokens)],
        )

    def select(self, indices: Sequence[int]) -> GateTrace:
        """A trace of some of the requests, in the given order."""
        rows: list[np.ndarray] = [np.arange(self.row_starts[i], self.row_starts[i + 1]) for i in indices]
        flat = np.concatenate([*rows, np.empty(0, dtype=np.int64)]).astype(np.int64)
        starts = np.concatenate(([0], np.cumsum([len(r) for r in rows]))).astype(np.int64)
        per_row = {
            name: getattr(self, name)[flat]
            for name in ("tokens", "positions", "steps", "is_decode", "probs", "chosen", "ahead")
        }
        return replace(self, requests=tuple(self.requests[i] for i in indices), row_starts=starts, **per_row)

    def shuffled(self, seed: int) -> GateTrace:
        """The null case: what gates said is dealt anew to the rows, for every layer and phase by itself.

        How often an expert is used stays; nothing depends on time, on embeddings or on other layers any more.
        """
        rng = np.random.default_rng(seed)
        probs, chosen, ahead = self.probs.copy(), self.chosen.copy(), self.ahead.copy()
        for rows in (np.flatnonzero(self.is_decode), np.flatnonzero(~self.is_decode)):
            for layer in range(len(self.model.layers)):
                dealt = rng.permutation(rows)
                probs[rows, layer], chosen[rows, layer] = self.probs[dealt, layer], self.chosen[dealt, layer]
                if layer < ahead.shape[1]:
                    ahead[rows, layer] = self.ahead[rng.permutation(rows), layer]
        return replace(self, probs=probs, chosen=chosen, ahead=ahead)

    def save(self, path: Path) -> None:
        """Write one uncompressed .npz at exactly `path`, whole or not at all."""
        header = {
            "version": TRACE_VERSION,
            "model": asdict(self.model),
            "requests": [asdict(request) for request in self.requests],
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.savez(file, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def load_trace(path: Path) -> GateTrace:
    """Read a trace.

    Raises:
        InvalidRequest: not a trace, or of another version; names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(bytes(file["header"]))
            if header["version"] != TRACE_VERSION:
                raise InvalidRequest(f"{path}: trace version {header['version']}, this program reads {TRACE_VERSION}")
            arrays = {name: file[name] for name in _ARRAYS}
        return _from_header(header, arrays)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InvalidRequest(f"{path}: not a gate trace ({error}); `moesaic trace record` writes one") from error


def _from_header(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> GateTrace:
    model: dict[str, Any] = header["model"]
    requests: list[dict[str, Any]] = header["requests"]
    model["layers"] = tuple(model["layers"])
    for request in requests:
        request["prompt_ids"] = tuple(request["prompt_ids"])
    traced = tuple(TracedRequest(**request) for request in requests)
    return GateTrace(model=TracedModel(**model), requests=traced, **arrays)
