"""Fills a model with the dense weights of its checkpoint, and checks afterwards that it holds what the file holds.

Whatever the file has is used as stored; a weight is computed from another (tied) only where the file leaves it out.
Knows names and tensors; knows nothing of experts but which keys are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from actors.model.file_check import check_against_file
from actors.model.quantization import FP8, dequantize_dense
from actors.model.skeleton import set_tensor
from actors.weights.expert_layout import ConversionRules, ExpertLayout, is_expert_key
from cluster.errors import CheckpointError
from cluster.model.safetensors_index import TensorRef

_STORED = ("F32", "BF16", "F16")
_NAMED = 3  # so many unused tensors are named, the others counted
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # stored by old checkpoints, computed by every model


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSource:
    """The checkpoint, seen by who fills the dense part of a model.

    experts: names of the experts modules, whose tensors are left where they are.
    fp8_block: (rows, columns) of one scale of FP8 weights; None where nothing is FP8.
    """

    index: Mapping[str, TensorRef]
    rules: ConversionRules
    experts: Sequence[str]
    fp8_block: tuple[int, int] | None

    @property
    def where(self) -> Path | str:
        """The directory, for messages."""
        return next(iter(self.index.values())).file.parent if self.index else "checkpoint"


def load_dense(model: PreTrainedModel, source: DenseSource, layout: ExpertLayout) -> tuple[str, ...]:
    """Read every dense weight and tie those that the file leaves out.

    Args:
        layout: what the experts use of the file; the rest has to belong to the model, or is reported.
    Returns:
        What is odd about the checkpoint though it can be served, in words.

    Raises:
        CheckpointError: a tensor is missing, stored twice, of the wrong shape or of a dtype that is not read, or the
            model does not hold what the file says; names file and tensor.
    """
    names = list(source.experts)
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not is_expert_key(n, names)}
    persistent = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    wanted = parameters | persistent
    refs = _find(source, set(wanted))
    for name, ref, value in _read(refs):
        target = wanted[name]
        if tuple(target.shape) != ref.shape:
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name} has shape {ref.shape}, expected {tuple(target.shape)}"
            )
        if ref.dtype == FP8:
            value = dequantize_dense(ref, value, source.index, source.fp8_block)
        set_tensor(model, name, value.to(target.dtype), is_buffer=name in persistent)
    missing = set(wanted) - set(refs)
    odd = _tie(model, missing)
    if missing:
        first = sorted(missing)[0]
        raise CheckpointError(f"{source.where}: tensor {first} is missing ({len(missing)} missing in all)")
    check_against_file(model, refs, source.index, source.fp8_block)
    return (*odd, *_unused(model, source, layout, refs))


def _find(source: DenseSource, wanted: set[str]) -> dict[str, TensorRef]:
    """Where each weight of the model is stored; keys of experts and of parts the model does not have are not there."""
    refs: dict[str, TensorRef] = {}
    for key, ref in source.index.items():
        name = source.rules.rename(key)
        if name not in wanted or is_expert_key(name, source.experts):
            continue
        if name in refs:
            raise CheckpointError(f"{ref.file}: tensors {refs[name].name} and {key} are both {name}; one must go")
        refs[name] = ref
    return refs


def _read(refs: Mapping[str, TensorRef]) -> Iterator[tuple[str, TensorRef, Tensor]]:
    """Values one by one, file by file."""
    by_file: dict[Path, list[tuple[str, TensorRef]]] = {}
    for name, ref in refs.items():
        by_file.setdefault(ref.file, []).append((name, ref))
    for file, entries in by_file.items():
        with _open(file) as tensors:
            for name, ref in entries:
                if ref.dtype not in _STORED and ref.dtype != FP8:
                    raise CheckpointError(
                        f"{file}: tensor {ref.name} is stored as {ref.dtype}; one of F32, BF16, F16, {FP8} is read"
                    )
                yield name, ref, tensors.get_tensor(ref.name).clone()


def _tie(model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """Tie as `from_pretrained` does: what the file leaves out, to what it has; two that differ stay two.

    Args: missing: weights that the file does not have; those tied are taken out.
    """
    before = dict(model.all_tied_weights_keys)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would warn of is said here, where /status shows it
    try:
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
    finally:
        transformers_logging.set_verbosity(verbosity)
    return tuple(
        f"config.json ties {target} to {source}, but the checkpoint has both and they differ: both are used as they "
        f"are stored (set tie_word_embeddings to false in config.json if that is meant)"
        for target, source in sorted(before.items())
        if target not in model.all_tied_weights_keys
    )


def _unused(
    model: PreTrainedModel, source: DenseSource, layout: ExpertLayout, refs: Mapping[str, TensorRef]
) -> tuple[str, ...]:
    """A sentence on tensors of the checkpoint that nothing here reads, but for those that the family means to skip."""
    used = {ref.name for ref in refs.values()}
    used |= {f"{ref.name}_scale_inv" for ref in refs.values() if ref.dtype == FP8}
    used |= {part.name for expert in layout.experts.values() for part in expert.parts}
    skipped = re.compile("|".join((*_OLD_BUFFERS, *sorted(model._keys_to_ignore_on_load_unexpected or ()))))
    unused = sorted(
        key
        for key in source.index
        if key not in used and not skipped.search(key) and not skipped.search(source.rules.rename(key))
    )
    if not unused:
        return ()
    others = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
    return (
        f"tensors of the checkpoint belong to no part that {type(model).__name__} has by its config.json, and are not "
        f"used: {', '.join(unused[:_NAMED])}{others}",
    )


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from error
