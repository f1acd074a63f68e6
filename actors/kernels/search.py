"""Binds search.h with ctypes: what the searching thread computes beside the engine. Knows no torch, no policies.

Calls release the interpreter lock, which the engine's thread would otherwise wait for. Where the library was not built
the callers compute the same with numpy.

Shapes: T packed rows, S sequences of a step, E experts of a layer, K experts per token (top-k), D model dim.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Self

import numpy as np

from cluster.policies.next_use.kernels import LessonArrays, LessonRates, StepAddresses, StepArrays
from cluster.policies.signals import GateSignal

_STEP_SIZES = ("S", "L", "A", "E", "R")
_LESSON_SIZES = ("X", "first", "turns", "num_examples")
_DTYPES = {"examples_N": np.int64, "used_SLE": np.bool_}  # the others are float32


def _names(table: type) -> list[str]:
    return [field.name for field in fields(table)]


class GateForm(ctypes.Structure):
    """A gate and the one of the next layer; mirrors GateForm of search.h."""

    _fields_ = (
        ("E", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("D", ctypes.c_int64),
        ("is_sigmoid", ctypes.c_int32),
        ("next_is_sigmoid", ctypes.c_int32),
        ("matrix", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class StepStructure(ctypes.Structure):
    """A step that NextUse follows; mirrors StepUnderWay of search.h: sizes, discount, addresses of StepArrays."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _STEP_SIZES),
        ("discount", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _names(StepArrays)),
    )


class Lesson(ctypes.Structure):
    """What is learned of a step; mirrors Lesson of search.h: sizes, LessonRates, addresses of LessonArrays."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _LESSON_SIZES),
        *((name, ctypes.c_float) for name in _names(LessonRates)),
        *((name, ctypes.c_void_p) for name in _names(LessonArrays)),
    )


class PackedStep:
    """A step for `follow` and `learn`: the structure, what it points into, and room to compute."""

    def __init__(self, discount: float, arrays: StepArrays) -> None:
        S, L, A, E = arrays.kept_SLAE.shape
        R = arrays.ahead_votes_SLRWE.shape[2]
        self._kept_alive = arrays
        self.scratch = np.empty(2 * E, np.float32)
        self.structure = StepStructure(S=S, L=L, A=A, E=E, R=R, discount=discount, **_addresses(arrays))


class SearchKernels:
    """The compiled kernels of the search; of any thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._read_gate = library.moesaic_read_gate
        self._read_gate.argtypes = [
            ctypes.POINTER(GateForm), pointer, code, pointer, code, pointer, size, pointer, size, pointer,
        ]  # fmt: skip
        self._learn = library.moesaic_learn
        self._learn.argtypes = [ctypes.POINTER(StepStructure), ctypes.POINTER(Lesson), pointer]
        self._follow = library.moesaic_follow
        self._follow.argtypes = [ctypes.POINTER(StepStructure), size, pointer, pointer, pointer, code, pointer]
        for function in (self._read_gate, self._follow, self._learn):
            function.restype = None

    def pack_step(self, discount: float, arrays: StepArrays) -> PackedStep:
        """A step for `follow` and `learn`, which write into the arrays."""
        return PackedStep(discount, arrays)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self  # code, no state

    def gate_form(
        self,
        num_experts: int,
        top_k: int,
        *,
        is_sigmoid: bool,
        matrix: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        next_is_sigmoid: bool = False,
    ) -> GateForm:
        """Of a gate for `read_gate`. Args: matrix, bias: [D, E], [E] float32 of the next layer's, if it is asked."""
        dim = 0 if matrix is None else len(matrix)
        form = GateForm(num_experts, top_k, dim, is_sigmoid, next_is_sigmoid, _address(matrix), _address(bias))
        form.kept_alive = (matrix, bias)
        return form

    def read_gate(
        self,
        form: GateForm,
        logits: tuple[int, int],
        hidden: tuple[int, int],
        chosen: int,
        starts: np.ndarray,
        num_rows: int,
    ) -> np.ndarray:
        """What a gate said of sequences whose rows begin at `starts` [S] int64, and the next gate of the same rows.

        Args:
            logits, hidden: [T, E] and [T, D], contiguous: address, and dtype as DTYPE_CODES of native.py has it.
            chosen: address of [T, K] int64, contiguous.
        Returns:
            [3, S, E]: mean probabilities, rows that chose an expert, mean probabilities of the next gate (or zeros).
        """
        S, E = len(starts), form.E
        said = np.empty((3 * S + 1) * E, np.float32)
        self._read_gate(form, *logits, *hidden, chosen, num_rows, starts.ctypes.data, S, said.ctypes.data)
        return said[: 3 * S * E].reshape(3, S, E)

    def follow(self, step: StepAddresses, gates: Sequence[GateSignal]) -> None:
        """Take in what gates said, in the order of their layers: see NextUse."""
        for gate in gates:
            heard = [
                None if said is None else np.ascontiguousarray(said) for said in (gate.probs, gate.counts, gate.ahead)
            ]
            addresses = [None if said is None else said.ctypes.data for said in heard]
            self._follow(step.structure, gate.row, *addresses, gate is gates[-1], step.scratch.ctypes.data)

    def learn(self, step: StepAddresses, rates: LessonRates, arrays: LessonArrays, *, first: int, turns: int) -> None:
        """Learn from a step that is over; of layers `first`, `first` + `turns`, ...: see NextUse."""
        sizes, num_examples = step.structure, len(arrays.examples_N)
        X, G = arrays.embedded_before_SX.shape[1], (1 + sizes.A) * sizes.E
        width = (sizes.L + max(sizes.L, sizes.R)) * sizes.E + 2 * max(X, G, 2 * sizes.E)
        scratch = np.empty(num_examples * width, np.float32)
        lesson = Lesson(X=X, first=first, turns=turns, num_examples=num_examples, **asdict(rates), **_addresses(arrays))
        self._learn(step.structure, lesson, scratch.ctypes.data)


def _address(array: np.ndarray | None, dtype: type = np.float32) -> int | None:
    assert array is None or (array.dtype == dtype and array.flags.c_contiguous)
    return None if array is None else array.ctypes.data


def _addresses(table: StepArrays | LessonArrays) -> dict[str, int | None]:
    return {name: _address(getattr(table, name), _DTYPES.get(name, np.float32)) for name in _names(type(table))}


def load_search() -> SearchKernels | None:
    """The compiled kernels, or None where they were not built."""
    spec = importlib.util.find_spec("actors.kernels._native")
    return None if spec is None or spec.origin is None else SearchKernels(ctypes.CDLL(spec.origin))
