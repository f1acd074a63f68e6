"""Where the matrices of every routed expert lie in a checkpoint, and in which form.

Names are derived from transformers' own checkpoint conversion mapping, the format from what is stored, so that a family
needs no table here. Knows names, shapes and offsets; reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actors.weights.activation_functions import Activation
from actors.weights.formats.base import FLOAT_DTYPES, TORCH_DTYPES, WeightFormat
from actors.weights.formats.dense import DenseFormat
from actors.weights.formats.expert import ExpertForm
from actors.weights.formats.fp8_block import Fp8BlockFormat
from actors.weights.formats.mxfp4 import Mxfp4Format
from cluster.errors import CheckpointError
from cluster.model.safetensors_index import TensorRef
from cluster.types import ExpertId


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The stored parts of one expert, each contiguous in its file, in the order of ExpertForm.part_names."""

    parts: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayout:
    """All routed experts of a model; every expert has the same shapes and form.

    stored_dtype: of the matrices, as safetensors calls it.
    """

    experts: Mapping[ExpertId, ExpertTensors]
    form: ExpertForm
    layers: tuple[int, ...]
    num_experts: int
    hidden: int
    intermediate: int
    stored_dtype: str

    @property
    def stored_bytes(self) -> int:
        """Routed-expert bytes in the checkpoint, packing, scales and biases included."""
        return sum(part.num_bytes for expert in self.experts.values() for part in expert.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleForm:
    """What the model's experts modules say of themselves, in transformers' terms, and the config of FP8 blocks.

    interleaved: gate and up take turns along the output dim of `gate_up_proj`, instead of one after the other.
    fp8_block: (rows, columns) of one scale, from quantization_config.weight_block_size.
    """

    activation: Activation
    transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    fp8_block: tuple[int, int] | None = None


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
    module_form: ModuleForm | None = None,
) -> ExpertLayout:
    """Find every expert's parts.

    Args:
        modules: layer index by the name of its experts module in the model.
        module_form: default: row-major, gate then up, SiLU, no bias.
    Raises:
        CheckpointError: a part is missing, has the wrong shape or a format that is not read; names file and tensor.
    """
    says = module_form or ModuleForm(activation=Activation("silu"))
    found = _find_parts(index, rules, modules, says)
    dtypes = {ref.dtype for (_, part, _), ref in found.items() if part in ("gate", "up", "gate_up", "down")}
    form = _form(found, dtypes, says, _any_file(index))
    experts: dict[ExpertId, ExpertTensors] = {}
    for module, layer in modules.items():
        for expert in range(num_experts):
            parts: list[TensorRef] = []
            for name in form.part_names:
                ref = found.get((module, name, expert))
                if ref is None:
                    raise CheckpointError(_missing(form, found, module, name, expert, _any_file(index)))
                try:
                    shape = form.shape(name, hidden, intermediate)
                except ValueError as error:
                    raise CheckpointError(f"{ref.file}: tensor {ref.name}: {error}") from error
                if ref.shape != shape:
                    raise CheckpointError(f"{ref.file}: tensor {ref.name} has shape {ref.shape}, expected {shape}")
                parts.append(ref)
            experts[ExpertId(layer, expert)] = ExpertTensors(tuple(parts))
    return ExpertLayout(
        experts=experts,
        form=form,
        layers=tuple(sorted(modules.values())),
        num_experts=num_experts,
        hidden=hidden,
        intermediate=intermediate,
        stored_dtype=dtypes.pop() if dtypes else "F32",
    )


def is_expert_key(name: str, modules: Iterable[str]) -> bool:
    """Whether a model parameter name (renamed) belongs to a routed-experts module."""
    return any(name.startswith(module + ".") for module in modules)


_Found = Mapping[tuple[str, str, int], TensorRef]  # by (module, part, expert)


def _find_parts(
    index: Mapping[str, TensorRef], rules: ConversionRules, modules: Mapping[str, int], says: ModuleForm
) -> dict[tuple[str, str, int], TensorRef]:
    found: dict[tuple[str, str, int], TensorRef] = {}
    fused: list[tuple[str, str, TensorRef]] = []
    packed = False
    for key, ref in index.items():
        name = rules.rename(key)
        kind = "_scales" if name.endswith("_scale_inv") else ""
        for module, expert, matrix in _match(rules, name.removesuffix("_scale_inv")):
            found[module, matrix + kind, expert] = ref
        module, _, parameter = name.rpartition(".")
        if module in modules:
            fused.append((module, parameter, ref))
            packed = packed or parameter.endswith("_blocks")
    joined = says.interleaved or (says.transposed and not packed)
    for module, parameter, ref in fused:
        for part, expert, piece in _fused(parameter, ref, joined):
            found[module, part, expert] = piece
    return found


def _form(found: _Found, dtypes: set[str], says: ModuleForm, file: str) -> ExpertForm:
    """The form of experts whose matrices are stored as `dtypes`."""
    if len(dtypes) > 1 or not dtypes <= {*FLOAT_DTYPES, "F8_E4M3", "U8"}:
        raise CheckpointError(
            f"{file}: experts are stored as {sorted(dtypes)}; one of BF16, F16, F32, F8_E4M3, U8 (MXFP4) is read"
        )
    stored = next(iter(dtypes), "F32")
    weights: WeightFormat
    if stored == "U8":
        _one_dtype(found, "scales", ("U8",))
        weights = Mxfp4Format()
    elif stored == "F8_E4M3":
        if says.fp8_block is None:
            raise CheckpointError(
                f"{file}: experts are FP8, but config.json has no quantization_config.weight_block_size"
            )
        scale_dtype = _one_dtype(found, "scales", FLOAT_DTYPES) or "F32"
        try:
            weights = Fp8BlockFormat(*says.fp8_block, TORCH_DTYPES[scale_dtype])
        except ValueError as error:
            raise CheckpointError(f"{file}: quantization_config.weight_block_size: {error}") from error
    else:
        weights = DenseFormat(TORCH_DTYPES[stored])
    if weights.has_scales and stored != "U8" and (says.transposed or says.interleaved):
        raise CheckpointError(f"{file}: transposed or interleaved experts in {weights.name} are not supported")
    bias_dtype = None
    if says.has_bias:
        bias_dtype = TORCH_DTYPES[_one_dtype(found, "bias", FLOAT_DTYPES if weights.has_scales else (stored,)) or "F32"]
    return ExpertForm(
        format=weights,
        activation=says.activation,
        transposed=says.transposed and stored != "U8",  # MXFP4 blocks run along the inputs of each output
        interleaved=says.interleaved,
        bias_dtype=bias_dtype,
    )


def _one_dtype(found: _Found, kind: str, allowed: Iterable[str]) -> str | None:
    """The stored dtype of all scales or biases; None if there are none."""
    refs = [ref for (_, part, _), ref in found.items() if part.endswith(kind)]
    for ref in refs:
        if ref.dtype not in allowed or ref.dtype != refs[0].dtype:
            others = "" if ref.dtype not in allowed else f", others as {refs[0].dtype}"
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name} is stored as {ref.dtype}{others}; one of {', '.join(allowed)} is read"
            )
    return refs[0].dtype if refs else None


def _missing(form: ExpertForm, found: _Found, module: str, part: str, expert: int, file: str) -> str:
    data = found.get((module, part.removesuffix("_scales"), expert))
    if part.endswith("_scales") and data is not None:
        return f"{data.file}: tensor {form.format.scales_name(data.name)} is missing: the scales of {data.name}"
    kind = "bias" if part.endswith("_bias") else "matrix"
    return f"{file}: no {part.removesuffix('_bias')} {kind} for expert {expert} of {module}"


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


_FUSED = re.compile(r"(gate_up|down)_proj(_blocks|_scales|_scale_inv|_bias|)")
_KINDS = {"": "", "_blocks": "", "_scales": "_scales", "_scale_inv": "_scales", "_bias": "_bias"}


def _fused(parameter: str, ref: TensorRef, joined: bool) -> Iterable[tuple[str, int, TensorRef]]:
    """Parts of all experts stored as one tensor [E, ...]. joined: gate and up cannot be told apart by rows."""
    match = _FUSED.fullmatch(parameter)
    if match is None or len(ref.shape) < 2:
        return
    matrix, kind = match.group(1), _KINDS[match.group(2)]
    for expert in range(ref.shape[0]):
        item = ref.item(expert)
        if matrix == "down" or joined:
            yield matrix + kind, expert, item
        else:
            half = item.shape[0] // 2
            yield "gate" + kind, expert, item.row_slice(0, half)
            yield "up" + kind, expert, item.row_slice(half, 2 * half)


def _any_file(index: Mapping[str, TensorRef]) -> str:
    return str(next(iter(index.values())).file) if index else "checkpoint"
