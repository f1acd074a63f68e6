"""Small quantised checkpoints as they are released, each beside a plain one that holds the dequantised weights.

Knows how a checkpoint of each kind looks on disk; quantises with formulas of its own, not with the code under test.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_builders import build_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8_BLOCK = 32  # released checkpoints have 128; these matrices are small
_QUANTISED = re.compile(
    r"(self_attn\.\w+|mlp\.\w+|mlp\.experts\.\d+\.\w+|shared_experts?\.\w+)_proj(_with_mqa|)\.weight$"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A quantised checkpoint and the same weights in float32."""

    packed: Path
    plain: Path


def build_gpt_oss(directory: Path, **changes: Any) -> Pair:
    """GPT-OSS: experts in MXFP4, [E, out, in / 32, 16], the rest in plain floats."""
    source = build_checkpoint(directory / "source", "gpt_oss", **changes)
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, weights = to_mxfp4(tensor.transpose(1, 2))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = weights.transpose(1, 2).contiguous()
        elif name.endswith("_proj_bias"):
            packed[name] = tensor.bfloat16()
            plain[name] = packed[name].float()
        else:
            packed[name] = plain[name] = tensor
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _write(directory, source, packed, plain, settings)


def build_fp8(directory: Path, family: str, *, scale_dtype: torch.dtype = torch.float32, **changes: Any) -> Pair:
    """DeepSeek-V3's way: attention, MLPs and experts in blocks with scales; one module is left out."""
    source = build_checkpoint(directory / "source", family, **changes)
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    left_out = "model.layers.0.self_attn.o_proj"
    for name, tensor in load_file(source / "model.safetensors").items():
        if _QUANTISED.search(name) and not name.startswith(left_out):
            codes, scales, weights = to_fp8(tensor, scale_dtype)
            packed |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = weights
        else:
            packed[name] = plain[name] = tensor
    settings = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK], "modules_to_not_convert": [left_out],
    }  # fmt: skip
    return _write(directory, source, packed, plain, settings)


def to_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [.., n / 32, 16], scales [.., n / 32] and the values [.., n] they stand for."""
    grouped = weights.unflatten(-1, (-1, 32))
    exponent = grouped.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2
    scaled = grouped / exponent.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    values = E2M1[codes] * scaled.sign() * exponent.exp2().unsqueeze(-1)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., ::2] + 16 * codes[..., 1::2], (exponent + 127).to(torch.uint8), values.flatten(-2)


def to_fp8(weights: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, D], scales [ceil(N / 32), ceil(D / 32)] and the values they stand for."""
    rows, cols = weights.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    values = torch.empty(rows, cols)
    scales = torch.empty(-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK), dtype=scale_dtype)
    for r, c in _blocks(rows, cols):
        area = (slice(r, r + FP8_BLOCK), slice(c, c + FP8_BLOCK))
        scale = (weights[area].abs().max() / 448).to(scale_dtype)
        scales[r // FP8_BLOCK, c // FP8_BLOCK] = scale
        codes[area] = (weights[area] / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        values[area] = codes[area].float() * scale.float()
    return codes, scales, values


def edit(checkpoint: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Let `change` alter the tensors of a checkpoint."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def _blocks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    return ((r, c) for r in range(0, rows, FP8_BLOCK) for c in range(0, cols, FP8_BLOCK))


def _write(
    directory: Path, source: Path, packed: dict[str, Tensor], plain: dict[str, Tensor], settings: dict[str, Any]
) -> Pair:
    pair = Pair(directory / "packed", directory / "plain")
    for path, tensors in ((pair.packed, packed), (pair.plain, plain)):
        shutil.copytree(source, path)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (pair.packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return pair
