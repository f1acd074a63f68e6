"""Where the three matrices of every routed expert lie in a checkpoint.

Derived from transformers' own checkpoint conversion mapping, so that a family needs no table here.
Knows names, shapes and offsets; reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actors.model.safetensors_index import TensorRef
from cluster.errors import CheckpointError
from cluster.types import ExpertId


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """gate and up are [I, D], down is [D, I]; row-major as stored."""

    gate: TensorRef
    up: TensorRef
    down: TensorRef

    @property
    def parts(self) -> tuple[TensorRef, TensorRef, TensorRef]:
        return (self.gate, self.up, self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """All routed experts of a model; every expert has the same shape and stored dtype."""

    experts: Mapping[ExpertId, ExpertTensors]
    layers: tuple[int, ...]
    num_experts: int
    hidden: int
    intermediate: int
    stored_dtype: str

    @property
    def stored_bytes(self) -> int:
        """Routed-expert bytes in the checkpoint."""
        return sum(part.num_bytes for expert in self.experts.values() for part in expert.parts)


@dataclass(frozen=True, slots=True)
class ConversionRules:
    """The part of transformers' conversion mapping that concerns names.

    renamings: (pattern, replacement) pairs applied to a checkpoint key in order.
    merges: checkpoint patterns (with `*` for the expert index) in order, and the target they merge into.
    """

    renamings: tuple[tuple[str, str], ...]
    merges: tuple[tuple[tuple[str, ...], str], ...]

    def rename(self, key: str) -> str:
        """The model's parameter name of a checkpoint key (before experts are merged)."""
        for pattern, replacement in self.renamings:
            key = re.sub(pattern, replacement, key)
        return key


def conversion_rules(model_type: str) -> ConversionRules:
    """Rules that transformers applies to checkpoints of `model_type`."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renamings: list[tuple[str, str]] = []
    merges: list[tuple[tuple[str, ...], str]] = []
    for rule in get_checkpoint_conversion_mapping(model_type) or ():
        sources, targets = rule.source_patterns, rule.target_patterns
        sources = [sources] if isinstance(sources, str) else list(sources)
        targets = [targets] if isinstance(targets, str) else list(targets)
        if len(targets) == 1 and any("experts" in source and "*" in source for source in sources):
            merges.append((tuple(sources), targets[0]))
        elif len(sources) == len(targets) == 1 and not getattr(rule, "operations", None):
            renamings.append((sources[0], targets[0]))
    return ConversionRules(tuple(renamings), tuple(merges))


def derive_layout(
    index: Mapping[str, TensorRef],
    rules: ConversionRules,
    modules: Mapping[str, int],
    *,
    num_experts: int,
    hidden: int,
    intermediate: int,
) -> ExpertLayout:
    """Find every expert's matrices.

    Args:
        modules: layer index by the name of its experts module in the model.
    Raises:
        CheckpointError: a matrix is missing or has the wrong shape; names file and tensor.
    """
    found: dict[tuple[str, str, int], TensorRef] = {}
    for key, ref in index.items():
        for target, expert, part in _match(rules, rules.rename(key)):
            found[target, part, expert] = ref
        for target, expert, part, piece in _fused(rules.rename(key), ref, modules):
            found[target, part, expert] = piece
    experts: dict[ExpertId, ExpertTensors] = {}
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    for module, layer in modules.items():
        for expert in range(num_experts):
            parts: dict[str, TensorRef] = {}
            for part, shape in shapes.items():
                ref = found.get((module, part, expert))
                if ref is None:
                    raise CheckpointError(f"{_any_file(index)}: no {part} matrix for expert {expert} of {module}")
                if ref.shape != shape:
                    raise CheckpointError(f"{ref.file}: tensor {ref.name} has shape {ref.shape}, expected {shape}")
                parts[part] = ref
            experts[ExpertId(layer, expert)] = ExpertTensors(**parts)
    dtypes = {part.dtype for expert in experts.values() for part in expert.parts}
    if len(dtypes) != 1 or not dtypes <= {"BF16", "F16", "F32"}:
        raise CheckpointError(
            f"{_any_file(index)}: experts are stored as {sorted(dtypes)}; one of BF16, F16, F32 is read"
        )
    return ExpertLayout(
        experts=experts,
        layers=tuple(sorted(modules.values())),
        num_experts=num_experts,
        hidden=hidden,
        intermediate=intermediate,
        stored_dtype=dtypes.pop(),
    )


def is_expert_key(name: str, modules: Iterable[str]) -> bool:
    """Whether a model parameter name (renamed) belongs to a routed-experts module."""
    return any(name.startswith(module + ".") for module in modules)


def _match(rules: ConversionRules, name: str) -> Iterable[tuple[str, int, str]]:
    for sources, target in rules.merges:
        for position, source in enumerate(sources):
            match = re.search(re.escape(source).replace(r"\*", r"(\d+)") + "$", name)
            if match is None:
                continue
            merged = name[: match.start()] + target
            module, _, parameter = merged.rpartition(".")
            part = "down" if parameter.startswith("down") else ("gate", "up")[position]
            yield module, int(match.group(1)), part


def _fused(name: str, ref: TensorRef, modules: Mapping[str, int]) -> Iterable[tuple[str, int, str, TensorRef]]:
    """Experts stored as one [E, 2I, D] and one [E, D, I] tensor."""
    module, _, parameter = name.rpartition(".")
    if module not in modules or len(ref.shape) != 3:
        return
    for expert in range(ref.shape[0]):
        item = ref.item(expert)
        if parameter == "gate_up_proj":
            half = item.shape[0] // 2
            yield module, expert, "gate", item.row_slice(0, half)
            yield module, expert, "up", item.row_slice(half, 2 * half)
        elif parameter == "down_proj":
            yield module, expert, "down", item


def _any_file(index: Mapping[str, TensorRef]) -> str:
    return str(next(iter(index.values())).file) if index else "checkpoint"
