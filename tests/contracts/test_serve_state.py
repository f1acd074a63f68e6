"""What serve_state.py uses of Serve that Serve does not promise, held against the Serve that is installed."""

from __future__ import annotations

import inspect

import pytest

pytestmark = pytest.mark.slow  # Ray Serve takes seconds to import


def test_the_controller_has_the_name_by_which_it_is_looked_up() -> None:
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    from actors.ray_shells.serve_state import CONTROLLER, CONTROLLER_NAMESPACE

    assert (CONTROLLER, CONTROLLER_NAMESPACE) == (SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)


def test_it_answers_with_the_status_and_the_deployments_of_each_application() -> None:
    from ray.serve._private.controller import ServeController
    from ray.serve.schema import ApplicationDetails, ApplicationStatus, ServeInstanceDetails

    from cluster.control.presence import ServedApplication

    assert list(inspect.signature(ServeController.get_serve_instance_details).parameters)[1:2] in ([], ["source"])
    assert "applications" in ServeInstanceDetails.model_fields
    assert {"status", "deployments", "route_prefix"} <= set(ApplicationDetails.model_fields)
    seen = {status.value: ServedApplication(status.value, frozenset()) for status in ApplicationStatus}
    assert [name for name, each in seen.items() if each.is_coming] == ["NOT_STARTED", "DEPLOYING"]
    assert [name for name, each in seen.items() if each.is_going] == ["DELETING"]
