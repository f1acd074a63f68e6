"""Two processes take experts from each other only if their slots hold equal bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from expert_builders import write_experts

from actors.experts.memory.shelves import form_digest
from actors.weights.slots import SlotForm


def test_forms_are_equal_exactly_when_slots_are(tmp_path: Path) -> None:
    def digest(name: str, held: torch.dtype, **changes: object) -> str:
        return form_digest(SlotForm(write_experts(tmp_path / name, **changes).layout, held))  # type: ignore[arg-type]

    stored = digest("a", torch.float32)
    assert digest("copy", torch.float32) == stored, "where a node keeps its files is not part of it"
    assert digest("moved", torch.float32, shift=8) != stored, "matrices begin elsewhere in the slot"
    assert digest("few", torch.float32, num_experts=5) != stored
    assert digest("halved", torch.bfloat16) != stored
    assert digest("halved moved", torch.bfloat16, shift=8) == digest("halved", torch.bfloat16), "converted: no offsets"
