"""Metrics of the scheduler, as its status declares them: what is known of prompts, how even the load is, what moved.

Every front end gives the same values, so do not add them up over front ends.
"""

from __future__ import annotations

from cluster.observability.families import text_of
from cluster.status.fields import Kind, Metric, Sample, samples
from cluster.status.scheduler import SchedulerStatus

_UP = Metric("moesaic_scheduler_up", Kind.GAUGE, "Whether the scheduler answers.")


def scheduler_metrics_text(status: SchedulerStatus | None) -> str:
    """Prometheus text. Args: status: None while the scheduler is away."""
    return text_of([Sample(_UP, {}, float(status is not None)), *(() if status is None else samples(status))])
