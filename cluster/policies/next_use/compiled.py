"""A step and the models of NextUse as the structures that compiled code reads. See kernels.py for the shapes."""

from __future__ import annotations

import numpy as np

from cluster.policies.next_use import trajectory
from cluster.policies.next_use.kernels import LessonArrays, LessonRates, StepArrays
from cluster.policies.next_use.models import NextUseModels
from cluster.policies.next_use.step import Expected, StepUnderWay


def step_arrays(
    step: StepUnderWay, expected: Expected, models: NextUseModels, nearness_LL: np.ndarray, values_LE: np.ndarray
) -> StepArrays:
    """What following a step reads and writes."""
    ahead = models.trajectory.arrays
    return StepArrays(
        num_rows_S=step.num_rows,
        shares_SA=step.shares,
        kept_SLAE=step.kept,
        gates_SLCE=step.gates,
        logs_SLCE=step.logs,
        used_SLE=step.used,
        past_SLE=expected.past_SLE,
        worth_votes_SLVE=expected.worth_votes_SLVE,
        ahead_votes_SLRWE=expected.ahead_votes_SLRWE,
        worth_LE=expected.worth_LE,
        hazards_LE=expected.hazards_LE,
        nearness_LL=nearness_LL,
        values_LE=values_LE,
        of_own_LGE=models.worth.arrays["of_own"],
        worth_blend_LV=models.worth_blend.arrays["weights"],
        matrices_LFRE=ahead["matrices"],
        ahead_blend_LRW=ahead["weights"],
    )


def lesson_arrays(
    step: StepUnderWay, expected: Expected, models: NextUseModels, examples_N: np.ndarray
) -> LessonArrays:
    """What learning from a step reads and writes beside that."""
    soon, worth = models.soon.arrays, models.worth.arrays
    return LessonArrays(
        examples_N=examples_N,
        embedded_before_SX=step.before.embedded,
        embedded_after_SX=step.after.embedded,
        gates_before_SLG=step.before.gates,
        soon_votes_SLVE=expected.soon_votes_SLVE,
        past_votes_SLVE=expected.past_votes_SLVE,
        soon_SLE=expected.soon_SLE,
        soon_bias_LE=soon["bias"],
        soon_of_common_XLE=soon["of_common"],
        soon_of_own_LGE=soon["of_own"],
        worth_bias_LE=worth["bias"],
        worth_of_common_XLE=worth["of_common"],
        soon_blend_LV=models.soon_blend.arrays["weights"],
    )


def lesson_rates(models: NextUseModels) -> LessonRates:
    """How much one example corrects."""
    rates = models.soon.rates
    return LessonRates(
        bias_rate=rates.bias,
        common_rate=rates.common,
        own_rate=rates.own,
        blend_rate=models.soon_blend.rate,
        ahead_rate=trajectory.RATE,
        ahead_blend_rate=trajectory.BLEND_RATE,
    )
