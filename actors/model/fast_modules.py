"""Swaps the forward of small dense modules for compiled kernels, where that is faster and equal.

Knows module shapes and kernels; knows no model family: a norm is swapped only after its output was
compared with the module's own on random input, a linear layer only up to the number of rows that
calibration found. Everything else keeps the model's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.kernels.native import DTYPE_CODES, NativeKernels
from actors.kernels.timing import best_time

_MAX_NATIVE_ROWS = 64
_ROPE = "apply_rotary_pos_emb"


def speed_up(model: nn.Module, native: NativeKernels) -> int:
    """Swap what can be swapped; the number of rows up to which linear layers run compiled."""
    linears = [
        m for m in model.modules() if type(m) is nn.Linear and m.weight.dtype in DTYPE_CODES and not m.weight.is_meta
    ]
    max_rows = _calibrate_rows(linears, native)
    for linear in linears:
        linear.forward = _linear_forward(linear, native, max_rows)  # type: ignore[method-assign]
    for module in model.modules():
        eps = getattr(module, "variance_epsilon", None)
        if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float) and _norm_agrees(module, native, eps):
            module.forward = _norm_forward(module, native, eps)  # type: ignore[method-assign]
        if _calls_rope(type(module).forward):
            _swap_rope(module, native)
    return max_rows


def _linear_forward(linear: nn.Linear, native: NativeKernels, max_rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = linear.weight.data, linear.bias
    limit = max_rows * weight.shape[1]

    def forward(x: Tensor) -> Tensor:
        if x.numel() > limit or x.dtype not in DTYPE_CODES or x.dtype == torch.float16:
            return F.linear(x, weight, bias)
        out = native.linear(x, weight)
        return out if bias is None else out + bias

    return forward


def _norm_forward(module: nn.Module, native: NativeKernels, eps: float) -> Callable[[Tensor], Tensor]:
    weight: Tensor = module.weight.data  # type: ignore[union-attr, assignment]
    original = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != weight.dtype:
            return original(hidden_states)
        return native.rms_norm(hidden_states, weight, eps)

    return forward


def _norm_agrees(module: nn.Module, native: NativeKernels, eps: float) -> bool:
    """Whether the module is the plain x / rms(x) * weight, rounded in the usual place."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(3, weight.shape[0], generator=generator)).to(weight.dtype)
    with torch.inference_mode():
        expected, got = module(x), native.rms_norm(x, weight.data, eps)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 1e-2
    return expected.dtype == got.dtype and torch.allclose(expected.float(), got.float(), rtol=tolerance, atol=1e-6)


def _calls_rope(forward: Callable[..., object]) -> bool:
    """Whether the model's own code, below what decorates it, calls the rotary function by the common name."""
    own = inspect.unwrap(forward)
    return isinstance(own, FunctionType) and _ROPE in own.__globals__ and _ROPE in own.__code__.co_names


def _swap_rope(module: nn.Module, native: NativeKernels) -> None:
    """Give this module its own copy of its forward in which the rotary function is ours, if it computes the same.

    The model's code is left alone: other models in this process keep their own.
    """
    decorated = type(module).forward
    forward = inspect.unwrap(decorated)
    original = forward.__globals__[_ROPE]

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        fits = q.dtype == k.dtype == cos.dtype and q.shape[3] == k.shape[3] == cos.shape[-1]
        if unsqueeze_dim != 1 or len(q) != 1 or not fits or q.stride(3) != 1 or k.stride(3) != 1:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return native.rope(q, cos, sin), native.rope(k, cos, sin)

    if _rope_agrees(original, rope):
        copy = _decorated_alike(decorated, _copied(forward, {**forward.__globals__, _ROPE: rope}, forward.__closure__))
        if copy is not None:
            module.forward = MethodType(copy, module)  # type: ignore[method-assign]


def _copied(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    """The same code with other global names and other enclosed values."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _decorated_alike(decorated: FunctionType, own: FunctionType) -> FunctionType | None:
    """`own` under copies of the decorators of `decorated`; None where one does not say what it calls."""
    inner = getattr(decorated, "__wrapped__", None)
    if inner is None:
        return own
    below = _decorated_alike(inner, own)
    cells = decorated.__closure__ or ()
    if below is None or not any(_content(cell) is inner for cell in cells):
        return None
    closure = tuple(CellType(below) if _content(cell) is inner else cell for cell in cells)
    copy = _copied(decorated, decorated.__globals__, closure)
    copy.__wrapped__ = below  # type: ignore[attr-defined]
    return copy


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _rope_agrees(original: Callable[..., tuple[Tensor, Tensor]], ours: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.randn(1, 5, heads, 16, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2))
        cos, sin = (torch.randn(1, 5, 16, generator=generator).to(dtype) for _ in range(2))
        try:
            expected, got = original(q, k, cos, sin), ours(q, k, cos, sin)
        except (TypeError, ValueError, IndexError, RuntimeError):  # another signature or layout: not the common one
            return False
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        if not all(
            torch.allclose(a.float(), b.float(), rtol=tolerance, atol=1e-6) for a, b in zip(expected, got, strict=True)
        ):
            return False
    return True


def _calibrate_rows(linears: list[nn.Linear], native: NativeKernels) -> int:
    """Largest number of rows at which the compiled kernel beats torch on the model's most common shape."""
    shapes = [tuple(linear.weight.shape) for linear in linears]
    if not shapes:
        return 0
    out_features, in_features = max(set(shapes), key=shapes.count)
    same = [linear.weight.data for linear in linears if tuple(linear.weight.shape) == (out_features, in_features)][:16]
    rows = 1
    while rows <= _MAX_NATIVE_ROWS:
        x = torch.randn(1, rows, in_features).to(same[0].dtype)
        if best_time(lambda: [native.linear(x, w) for w in same]) > best_time(lambda: [F.linear(x, w) for w in same]):  # noqa: B023
            break
        rows *= 2
    return rows // 2
