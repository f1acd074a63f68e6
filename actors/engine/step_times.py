"""What steps cost lately, in seconds: the scheduler's measure of a worker's speed. Knows rows and times only."""

from __future__ import annotations

_RATE = 0.1  # of the newest step in the averages


class StepTimes:
    """Averages of recent steps, 0 until there was one.

    decode_s: of a step that only decodes. prefill_token_s: of each prompt token, beyond what decoding beside it takes.
    prefill_s: of all prompt tokens since start; no average.
    """

    def __init__(self) -> None:
        self.decode_s = 0.0
        self.prefill_token_s = 0.0
        self.prefill_s = 0.0

    def note(self, num_decode: int, num_prefill: int, seconds: float) -> None:
        """A step with so many rows of each kind took so long."""
        if not num_prefill:
            self.decode_s = _average(self.decode_s, seconds)
            return
        beside_s = self.decode_s if num_decode else 0.0
        prefill_s = max(seconds - beside_s, 0.0)
        self.prefill_s += prefill_s
        self.prefill_token_s = _average(self.prefill_token_s, prefill_s / num_prefill)


def _average(average: float, value: float) -> float:
    return value if average == 0 else average + _RATE * (value - average)
