"""Checks at start that this model's attention, packed and paged here, is the model's own.

Two short random sequences go through the real runner: packed together, in chunks, decoded, in scattered blocks, with
the compiled kernels in place. Their logits must be those of the untouched modules, which compute each sequence alone
with their own (eager) attention. A family that does something unforeseen is refused instead of answering wrongly.
Routed experts count as zero on both sides: they are not attention's business, and may not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.batcher import ScheduledRows
from actors.engine.model_runner import ModelRunner
from actors.engine.sequence import Sequence
from actors.engine.step import StepFailed
from actors.experts.dispatch import LocalDispatcher
from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork
from actors.kernels.native import NativeKernels
from actors.model.checkpoint import LoadedModel
from actors.model.seams import IMPLEMENTATION, bind
from cluster.errors import CheckpointError
from cluster.types import GenerationRequest, RequestId, SamplingParams

_BLOCK_SIZE = 4
_LENGTHS = (9, 13)
_BLOCKS = ((3, 1, 6), (5, 2, 7, 4))
_REDRAWS = 16
_STEPS = ((7, 5), (1, 6), (1, 1), (0, 1))  # rows of each sequence: chunks, then decoding
_MAX_ERROR = {torch.float32: 1e-2, torch.bfloat16: 0.25}  # of the logits' norm; rounding, not structure


@dataclass(frozen=True, slots=True)
class AttentionCheck:
    """What the model's own attention answers. logits: (length, vocabulary) of each sequence."""

    loaded: LoadedModel
    token_ids: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]

    @classmethod
    def prepare(cls, loaded: LoadedModel) -> AttentionCheck:
        """Ask the model itself; before any of its modules is swapped and before a runner takes it over."""
        model = loaded.model
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(model.config.get_text_config().vocab_size)
        table: Tensor = model.get_input_embeddings().weight  # type: ignore[operator, union-attr, assignment]
        ids = [_drawn(generator, table[:vocabulary], length) for length in _LENGTHS]
        bind(model, _NoExperts())
        model.config._attn_implementation = "eager"
        try:
            with torch.inference_mode():
                logits = tuple(model(input_ids=sequence, use_cache=False).logits[0].float() for sequence in ids)
        finally:
            model.config._attn_implementation = IMPLEMENTATION
        return cls(loaded, tuple(tuple(sequence[0].tolist()) for sequence in ids), logits)

    def verify(self, native: NativeKernels | None, native_rows: int) -> None:
        """Compute the same here.

        Raises:
            CheckpointError: the answers differ by more than rounding, or are not finite.
        """
        if not all(torch.isfinite(logits).all() for logits in self.logits):
            raise CheckpointError(
                f"{type(self.loaded.model).__name__}: logits are not finite (NaN or infinite) whatever the prompt: its "
                f"dense weights are damaged, or too large for {self.loaded.dtype}"
            )
        runner = ModelRunner(
            self.loaded, _NoExperts(), native, num_blocks=8, block_size=_BLOCK_SIZE, native_rows=native_rows
        )
        sequences = [_sequence(i, ids) for i, ids in enumerate(self.token_ids)]
        errors: dict[str, list[float]] = {"prompt": [], "decoding": []}
        for counts in _STEPS:
            rows = [ScheduledRows(s, count) for s, count in zip(sequences, counts, strict=True) if count]
            try:
                logits = runner.execute(rows).float()
            except StepFailed as failure:
                raise CheckpointError(f"{type(self.loaded.model).__name__}: {failure}") from failure
            for expected, sequence, count in zip(self.logits, sequences, counts, strict=True):
                wanted, got, logits = expected[sequence.computed :][:count], logits[:count], logits[count:]
                errors["prompt" if count > 1 else "decoding"] += _relative_errors(wanted, got)
                sequence.computed += count
        limit = _MAX_ERROR[self.loaded.dtype]
        for kind, values in errors.items():
            typical = sorted(values)[len(values) // 2]
            if not typical < limit:
                raise CheckpointError(
                    f"{type(self.loaded.model).__name__}: logits of {kind} rows differ from the model's own attention "
                    f"by {typical:.2g} of their norm (rounding is below {limit}); this family cannot be served exactly"
                )


def _drawn(generator: torch.Generator, table_VD: Tensor, length: int) -> Tensor:
    """[1, length] random token ids; one whose embedding is not finite says nothing of attention, another comes."""
    ids = torch.randint(len(table_VD), (1, length), generator=generator)
    for _ in range(_REDRAWS):
        bad = ~torch.isfinite(table_VD[ids].float()).all(dim=-1)
        if not bad.any():
            break
        ids[bad] = torch.randint(len(table_VD), (int(bad.sum()),), generator=generator)
    return ids


class _NoExperts(LocalDispatcher):
    """Routed experts that add nothing, for both sides of the comparison."""

    def __init__(self) -> None:
        """Needs no expert memory."""
        self.recorder = ActivationRecorder((), 0, None)

    def start(self, work: ExpertWork, num_rows: int, num_decode: int) -> Callable[[], Tensor]:
        return lambda: torch.zeros_like(work.hidden_TD)

    def run_experts(self, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return torch.zeros_like(hidden)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        raise AssertionError("the model attends by itself")

    def append_kv(self, layer: int, key: Tensor, value: Tensor) -> None:
        raise AssertionError("the model attends by itself, without a cache")


def _sequence(index: int, token_ids: tuple[int, ...]) -> Sequence:
    sampling = SamplingParams(max_tokens=1, num_prompt_logprobs=0)  # so that every row gets logits
    sequence = Sequence(GenerationRequest(request_id=RequestId(str(index)), prompt_ids=token_ids, sampling=sampling))
    sequence.add_blocks(list(_BLOCKS[index]), _BLOCK_SIZE)
    return sequence


def _relative_errors(wanted_RV: Tensor, got_RV: Tensor) -> list[float]:
    spread = (wanted_RV - wanted_RV.mean(dim=1, keepdim=True)).norm(dim=1)
    return ((got_RV - wanted_RV).norm(dim=1) / spread).tolist()
