"""Runs experts' FFNs with the fastest kernel for the number of rows, chosen by calibration.

Knows kernels and thresholds; knows nothing of caches. Two paths: the compiled kernel, which streams
weights once for few rows, and torch matmuls, which reuse them better for many rows (bf16 only:
in float32 the compiled kernel is as fast and does not let a row's result depend on its batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.kernels.native import NativeKernels
from actors.kernels.timing import best_time
from actors.weights.formats.base import Matrix
from actors.weights.formats.expert import ExpertForm, ExpertWeights

_NEVER = 1 << 30
_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """From `torch_from_rows` rows of one expert on, torch is used; `label` is for people."""

    torch_from_rows: int
    label: str


class ExpertCompute:
    """Expert FFNs of one model: fixed form, dtype and kernels."""

    def __init__(self, native: NativeKernels | None, form: ExpertForm, *, compute_dtype: torch.dtype) -> None:
        """Args: form: of the experts as the store holds them."""
        self._form = form
        self._kernel_form = form.kernel_form()
        self._native = native if self._kernel_form is not None else None
        self._dtype = compute_dtype
        self.plan = KernelPlan(_NEVER, "native") if self._native else KernelPlan(0, "torch")

    def calibrate(self, hidden: int, intermediate: int) -> KernelPlan:
        """Measure both paths on this machine and keep the cross-over; takes a fraction of a second."""
        if self._native is None or self._dtype == torch.float32:
            return self.plan
        weights = ExpertWeights.random(self._form, hidden, intermediate)
        threshold = _NEVER
        for rows in (8, 16, 32, 64, 128):
            x = torch.randn(rows, hidden)
            y = torch.empty(rows, hidden)
            offsets, pairs = np.array([0, rows]), np.arange(rows)
            native = best_time(lambda: self._run_native(x, [weights], offsets, pairs, y, top_k=1))  # noqa: B023
            plain = best_time(lambda: self._run_torch(x, weights, pairs, y, top_k=1))  # noqa: B023
            if plain < native:
                threshold = rows
                break
        label = "native" if threshold == _NEVER else f"native, torch from {threshold} rows"
        self.plan = KernelPlan(threshold, label)
        return self.plan

    def group(self, topk_ids: Tensor, num_experts: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Sort gate choices by expert, stably; see NativeKernels.group."""
        if self._native is not None:
            return self._native.group(topk_ids.contiguous(), num_experts)
        ids = topk_ids.numpy().reshape(-1)
        chosen = np.bincount(ids, minlength=num_experts)
        wanted = np.flatnonzero(chosen)
        return wanted.tolist(), np.concatenate(([0], np.cumsum(chosen[wanted]))), np.argsort(ids, kind="stable")

    def run(
        self,
        x_TD: Tensor,
        experts: Sequence[ExpertWeights],
        offsets: np.ndarray,
        pairs: np.ndarray,
        y_PD: Tensor,
        *,
        top_k: int,
    ) -> None:
        """Unweighted outputs of `experts` into the rows of y_PD that `pairs` names.

        Args:
            x_TD: contiguous.
            offsets: (len(experts) + 1,) int64 into pairs.
            pairs: int64; pair t * top_k + k is row t's k-th choice.
        """
        threshold = self.plan.torch_from_rows
        if len(pairs) < threshold:
            self._run_native(x_TD, experts, offsets, pairs, y_PD, top_k=top_k)
            return
        many = np.diff(offsets) >= threshold
        for i in np.flatnonzero(many).tolist():
            self._run_torch(x_TD, experts[i], pairs[offsets[i] : offsets[i + 1]], y_PD, top_k=top_k)
        few = np.flatnonzero(~many).tolist()
        if few:
            spans = [pairs[offsets[i] : offsets[i + 1]] for i in few]
            starts = np.cumsum([0, *(len(span) for span in spans)])
            self._run_native(x_TD, [experts[i] for i in few], starts, np.concatenate(spans), y_PD, top_k=top_k)

    def combine(self, y_PD: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum of each row's expert outputs, weighted, in gate order, in float32."""
        weights_TK = weights_TK.float().contiguous()
        if self._native is not None:
            return self._native.combine(y_PD, weights_TK, dtype)
        T, K = weights_TK.shape
        y_TKD = y_PD.view(T, K, -1)
        total = weights_TK[:, 0, None] * y_TKD[:, 0]
        for k in range(1, K):
            total += weights_TK[:, k, None] * y_TKD[:, k]
        return total.to(dtype)

    def _run_native(
        self,
        x_TD: Tensor,
        experts: Sequence[ExpertWeights],
        offsets: np.ndarray,
        pairs: np.ndarray,
        y_PD: Tensor,
        *,
        top_k: int,
    ) -> None:
        assert self._native is not None and self._kernel_form is not None
        self._native.experts_ffn(
            x_TD,
            [expert.pointers for expert in experts],
            offsets,
            pairs,
            y_PD,
            form=self._kernel_form,
            intermediate=experts[0].intermediate,
            top_k=top_k,
        )

    def _run_torch(self, x_TD: Tensor, expert: ExpertWeights, pairs: np.ndarray, y_PD: Tensor, *, top_k: int) -> None:
        index = torch.from_numpy(pairs)
        rows = x_TD[index // top_k].to(self._dtype)
        if self._dtype != torch.float32:  # oneDNN compiles a kernel per shape: keep the shapes few
            padded = next((b for b in _ROW_BUCKETS if b >= len(pairs)), len(pairs))
            rows = F.pad(rows, (0, 0, 0, padded - len(pairs)))
        hidden = self._form.activation(*self._gate_and_up(rows, expert))
        y_PD[index] = self._project(hidden, expert.down)[: len(pairs)].float()

    def _gate_and_up(self, rows: Tensor, expert: ExpertWeights) -> tuple[Tensor, Tensor]:
        gate = self._project(rows, expert.gate)
        if expert.up is None:
            return gate[:, ::2], gate[:, 1::2]
        return gate, self._project(rows, expert.up)

    def _project(self, rows: Tensor, matrix: Matrix) -> Tensor:
        weight = self._form.format.dequantize(matrix).to(self._dtype)
        bias = None if matrix.bias is None else matrix.bias.to(self._dtype)
        return F.linear(rows, weight.T if self._form.transposed else weight, bias)
