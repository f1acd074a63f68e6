"""The machine of a replay: what its knobs say of themselves."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

import pytest

from cluster.replay.machine import Knob, Processor

HINTS = get_type_hints(Processor, include_extras=True)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Processor)])
def test_each_knob_says_its_unit_and_how_it_is_measured(name: str) -> None:
    (knob,) = HINTS[name].__metadata__

    assert isinstance(knob, Knob)
    assert knob.unit == ("s" if name.endswith("_s") else "1")
    for sentence in (knob.meaning, knob.measured):
        assert sentence[0].isupper() and sentence.endswith(".")
