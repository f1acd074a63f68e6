"""What goes wrong with one sequence of a step stays with it: the others of the step are computed all the same.

Knows steps as rows of sequences, and errors; knows no model. A step that breaks off names those whose fault it is, or
is halved until one sequence fails alone. What is nobody's fault in particular (I/O, memory, a host that died, or every
sequence fails) ends all of them as `Unavailable`: the front end goes on with them elsewhere, or later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from actors.engine.batcher import ScheduledRows
from actors.engine.step import StepFailed
from cluster.errors import MoesaicError, Unavailable, codes_of
from cluster.logs import log_event
from cluster.types import RequestId

_LOG = logging.getLogger(__name__)
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # what torch says, in a RuntimeError

Item = TypeVar("Item")
Result = TypeVar("Result")


class StepRunner(Protocol):
    """What computes rows."""

    def execute(self, rows: Seq[ScheduledRows]) -> Tensor:
        """Logits of the rows that need them, in order. Raises StepFailed, or anything at all."""
        ...


@dataclass(slots=True)
class Executed:
    """What became of a step. rows: those computed, in the order planned. logits_RV: theirs, None of no rows.

    failures: the other sequences, and why.
    """

    rows: list[ScheduledRows] = field(default_factory=list[ScheduledRows])
    logits_RV: Tensor | None = None
    failures: dict[RequestId, MoesaicError] = field(default_factory=dict[RequestId, MoesaicError])


def execute(runner: StepRunner, planned: Seq[ScheduledRows]) -> Executed:
    """Compute all rows that can be computed."""
    done = Executed()
    unexplained: set[RequestId] = set()
    parts = _execute(runner, list(planned), done, unexplained)
    if len(planned) > 1 and len(unexplained) == len(planned):  # then it is not they
        done.failures = {request_id: lost_to(error) for request_id, error in done.failures.items()}
    done.rows = [rows for part, _ in parts for rows in part]
    logits = [logits_RV for _, logits_RV in parts]
    if logits:
        done.logits_RV = logits[0] if len(logits) == 1 else torch.cat(logits)
    return done


def _execute(
    runner: StepRunner, rows: list[ScheduledRows], done: Executed, unexplained: set[RequestId]
) -> list[tuple[list[ScheduledRows], Tensor]]:
    """Args: unexplained: filled with sequences that failed alone, without a reason of ours."""
    while rows:
        try:
            return [(rows, runner.execute(rows))]
        except StepFailed as failure:
            left = [each for each in rows if _id(each) not in failure.failures]
            if len(left) == len(rows):  # it names none of them
                done.failures |= {_id(each): lost_to(failure) for each in rows}
                return []
            done.failures |= failure.failures
            rows = left
        except Exception as error:  # noqa: BLE001 - torch and kernels raise anything; it is somebody's, or nobody's
            log_event(_LOG, logging.ERROR, "a forward failed", error=error, sequences=len(rows))
            if is_of_machine(error):
                done.failures |= {_id(each): lost_to(error) for each in rows}
                return []
            if len(rows) == 1:
                done.failures[_id(rows[0])] = failure_of(error, "computing it")
                unexplained.add(_id(rows[0]))
                return []
            half = len(rows) // 2
            first = _execute(runner, rows[:half], done, unexplained)
            return first + _execute(runner, rows[half:], done, unexplained)
    return []


def together_or_alone(
    items: Seq[Item], call: Callable[[Seq[Item]], Seq[Result]], what: str
) -> list[Result | MoesaicError]:
    """Results of all items in one call; if that fails one by one, with an error in the place of those that fail.

    Args: call: gives one result for each item, and changes nothing if it raises. what: it does, for the message.
    """
    try:
        return list(call(items))
    except Exception as error:  # noqa: BLE001 - found out below, one by one
        if len(items) == 1:
            log_event(_LOG, logging.ERROR, f"{what} failed", error=error)
            return [failure_of(error, what)]
    return [together_or_alone((item,), call, what)[0] for item in items]


def failure_of(error: BaseException, what: str) -> MoesaicError:
    """The error as one sequence's own: ours as it is, the machine's as one to try again, anything else as a bug."""
    if is_of_machine(error):
        return lost_to(error)
    return error if isinstance(error, MoesaicError) else MoesaicError(f"{what} failed: {error!r}")


def lost_to(error: BaseException) -> MoesaicError:
    """An error that no sequence is to blame for: who is given it tries again."""
    if isinstance(error, MoesaicError) and codes_of(error).retryable:
        return error
    return Unavailable(f"the attention worker could not compute its step ({_words(error)}); try again")


def is_of_machine(error: BaseException) -> bool:
    """Whether it says something of this process or its machine: I/O, memory, another process that is gone."""
    if isinstance(error, MoesaicError):
        return codes_of(error).retryable
    if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _words(error: BaseException) -> str:
    return error.message if isinstance(error, MoesaicError) else repr(error)


def _id(rows: ScheduledRows) -> RequestId:
    return rows.sequence.request.request_id
