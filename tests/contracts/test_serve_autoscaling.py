"""Ray Serve's autoscaling, fed and asked as its controller does: our policy gets its numbers and decides by them.

The classes are Serve's own and not public; a release that changes them shows here.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo

from actors.ray_shells.autoscaling import DemandMeter, worker_autoscaling
from cluster.config.load import MoesaicConfig, load_config
from cluster.scaling.rules import WorkerLoad

DEPLOYMENT = DeploymentID(name="AttentionWorker", app_name="moesaic")


def _config(**attention: Any) -> MoesaicConfig:
    scheduler = {"scale_up_after_s": 5, "scale_down_after_s": 60}
    return load_config(None, {"attention": attention, "scheduler": scheduler})


def _load(*, sequences: int = 0, waiting_tokens: int = 0, prefill_s: float = 0.0) -> WorkerLoad:
    return WorkerLoad(
        num_sequences=sequences,
        max_running=32,
        used_blocks=0,
        num_blocks=1000,
        block_size=16,
        waiting_tokens=waiting_tokens,
        prefill_s=prefill_s,
        prefill_token_s=0.001,
    )


class Controller:
    """Serve's controller with one deployment, and the time."""

    def __init__(self, config: MoesaicConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "time", lambda: self.now_s)
        autoscaling = worker_autoscaling(config)
        assert autoscaling is not None
        info = DeploymentInfo(
            deployment_config=DeploymentConfig(autoscaling_config=autoscaling),
            replica_config=ReplicaConfig.create(lambda: None),
            start_time_ms=0,
            deployer_job_id="job",
        )
        self.state = DeploymentAutoscalingState(DEPLOYMENT)
        self.target = self.state.register(info, 1)

    def turn(self, loads: list[WorkerLoad | None], seconds: float = 1.0) -> int:
        """Replicas run with these loads and report, time passes, Serve decides; its target."""
        replicas = [ReplicaID(unique_id=str(i), deployment_id=DEPLOYMENT) for i in range(len(loads))]
        self.state.update_running_replica_ids(replicas)
        for replica, load in zip(replicas, loads, strict=True):
            stats = DemandMeter(lambda load=load: load).stats()
            series = {name: [TimeStampedValue(self.now_s, value)] for name, value in stats.items()}
            self.state.record_request_metrics_for_replica(
                ReplicaMetricReport(replica_id=replica, timestamp=self.now_s, metrics=series)
            )
        self.now_s += seconds
        self.target = self.state.get_decision_num_replicas(self.target)
        return self.target


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    return Controller(_config(workers=1, max_workers=3), monkeypatch)


def test_waiting_prompts_bring_workers_and_calm_sends_them_away_after_the_cool_down(controller: Controller) -> None:
    burst = _load(sequences=3, waiting_tokens=9000)  # 9 s of prompts, and 5 s is what they may wait
    assert [controller.turn([burst]) for _ in range(7)] == [1] * 5 + [3] * 2
    calm = [_load(sequences=3)] * 3
    targets = [controller.turn(calm) for _ in range(80)]
    assert targets[:58] == [3] * 58 and targets[-1] == 1


def test_starting_workers_report_nothing_and_are_not_taken_for_idle(controller: Controller) -> None:
    for _ in range(10):
        controller.turn([_load(sequences=64)])
    assert controller.target == 3
    for _ in range(100):
        controller.turn([_load(sequences=2), None, None])
    assert controller.target == 3


def test_without_any_report_nothing_changes(controller: Controller) -> None:
    assert [controller.turn([None]) for _ in range(100)] == [1] * 100


def test_the_time_that_prompts_take_is_measured_between_two_questions() -> None:
    prefill_s = iter((5.0, 6.0, 6.0))
    now_s = iter((0.0, 2.0, 4.0))
    meter = DemandMeter(lambda: _load(prefill_s=next(prefill_s)), clock=lambda: next(now_s))
    assert [round(meter.stats()["demand_prompts"], 3) for _ in range(3)] == [0.0, 0.5, 0.0]


def test_a_fixed_number_of_workers_is_left_to_serve() -> None:
    assert worker_autoscaling(_config(workers=2)) is None
    assert worker_autoscaling(_config(workers=2, max_workers=2)) is None
