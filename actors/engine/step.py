"""The rows of one step, packed one sequence after the other, and where their keys and values lie.

Knows token ids, positions and KV slots; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.engine.batcher import ScheduledRows
from cluster.errors import MoesaicError
from cluster.types import RequestId


class StepFailed(Exception):
    """A step broke off because of some of its sequences: `failures` says why, the others may try again at once.

    Nothing of the step counts: an expert could not be read, or rows are not finite.
    """

    def __init__(self, failures: Mapping[RequestId, MoesaicError]) -> None:
        """Args: failures: at least one."""
        super().__init__("; ".join(dict.fromkeys(error.message for error in failures.values())))
        self.failures = dict(failures)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of the step belong to one sequence whose KV slots, after the step, are `slots`."""

    start: int
    stop: int
    slots: np.ndarray


@dataclass(slots=True)
class StepInputs:
    """One micro-batch, packed. Spans of one row come first, of them those that decode; padding rows come last.

    num_single: spans of one row, whatever they are: attention is computed for all of them at once.
    num_decode: of them, those that extend an answer; the others are the last row of a prompt.
    scored_rows: those whose logits are wanted, in the order of the rows that were scheduled.
    clusters: int32, the cluster of prompts of each row but padding, -1 for none.
    """

    token_ids: Tensor
    positions: Tensor
    write_slots: Tensor
    scored_rows: Tensor
    num_rows: int
    num_single: int
    num_decode: int
    prefill: list[Span]
    decode_slots: Tensor
    decode_starts: Tensor
    decode_ends: Tensor
    clusters: Tensor


def packed_order(rows: Seq[ScheduledRows]) -> list[ScheduledRows]:
    """The order in which a step packs its rows: single rows first, of them those that decode; else as scheduled."""
    return sorted(rows, key=lambda r: (r.num_rows > 1, not r.decodes))


def pack_rows(rows: Seq[ScheduledRows], buckets: Seq[int] = ()) -> StepInputs:
    """Args: buckets: the numbers of rows to pad to, ascending; more rows than the last stay as they are."""
    ordered = packed_order(rows)
    tokens: list[int] = []
    positions: list[int] = []
    write: list[np.ndarray] = []
    spans: list[Span] = []
    clusters: list[int] = []
    for item in ordered:
        sequence, first = item.sequence, item.sequence.computed
        last = first + item.num_rows
        spans.append(Span(len(tokens), len(tokens) + item.num_rows, sequence.slots[:last]))
        tokens.extend(sequence.tokens[first:last])
        positions.extend(range(first, last))
        clusters.extend([sequence.cluster] * item.num_rows)
        write.append(sequence.slots[first:last])
    num_rows = len(tokens)
    padding = next((bucket for bucket in buckets if bucket >= num_rows), num_rows) - num_rows
    write.append(np.zeros(padding, dtype=np.int64))  # block 0 takes what padding rows write
    place = {id(item.sequence): span for item, span in zip(ordered, spans, strict=True)}
    scored = [row for r in rows for stop in (place[id(r.sequence)].stop,) for row in range(stop - r.num_logits, stop)]
    num_single = sum(1 for item in ordered if item.num_rows == 1)
    lengths = np.array([len(span.slots) for span in spans[:num_single]], dtype=np.int64)
    ends = np.cumsum(lengths)
    decode = [span.slots for span in spans[:num_single]] or [np.empty(0, dtype=np.int64)]
    return StepInputs(
        token_ids=torch.tensor([tokens + [0] * padding]),
        positions=torch.tensor([positions + [0] * padding]),
        write_slots=torch.from_numpy(np.concatenate(write)),
        scored_rows=torch.tensor(scored, dtype=torch.int64),
        num_rows=num_rows,
        num_single=num_single,
        num_decode=sum(1 for item in ordered[:num_single] if item.decodes),
        prefill=spans[num_single:],
        decode_slots=torch.from_numpy(np.concatenate(decode)),
        decode_starts=torch.from_numpy(ends - lengths),
        decode_ends=torch.from_numpy(ends),
        clusters=torch.tensor(clusters, dtype=torch.int32),
    )
