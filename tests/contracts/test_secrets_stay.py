"""Keys reach front ends and nobody else: what each process is started with, and what it inherits."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import app
from cluster.config.load import load_config, take_secrets_from, to_tree, without_store

CLIENT, OPERATOR, PASSWORD = "key-of-the-clients", "key-of-the-operators", "password-of-redis"
SECRETS = {
    "frontend": {"api_key": CLIENT, "operator_key": OPERATOR},
    "redis": {"url": f"redis://:{PASSWORD}@127.0.0.1:6379/0"},
    "experts": {"hosts": 1, "remote_tier": "10%"},
}


def secrets_in(value: object) -> set[str]:
    """Those that are anywhere in what would be sent."""
    raw = pickle.dumps(value)
    return {secret for secret in (CLIENT, OPERATOR, PASSWORD) if secret.encode() in raw}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[object]]:
    """What `build` gives to each process, by its name; nothing is started."""
    import actors.ray_shells.deployments
    import actors.ray_shells.gateway_actors
    import actors.ray_shells.host_actor
    import actors.ray_shells.scheduler_actor
    import actors.ray_shells.shelf_actor

    given: dict[str, list[object]] = {}

    def note(name: str) -> Any:
        return lambda *args, **_: given.setdefault(name, []).extend(args)

    monkeypatch.setattr(actors.ray_shells.host_actor, "start_expert_hosts", note("hosts"))
    monkeypatch.setattr(actors.ray_shells.shelf_actor, "start_shelves", note("shelves"))
    monkeypatch.setattr(actors.ray_shells.scheduler_actor, "start_scheduler", note("scheduler"))
    monkeypatch.setattr(actors.ray_shells.gateway_actors.Gateways, "start", lambda _, *args: note("gateway")(args[1]))
    monkeypatch.setattr(actors.ray_shells.gateway_actors.Gateways, "check_port", lambda *_: None)
    monkeypatch.setattr(actors.ray_shells.scheduler_actor, "begin_deployment", lambda *_: None)
    monkeypatch.setattr(actors.ray_shells.deployments, "_num_front_ends", lambda: 1)
    monkeypatch.setattr(actors.ray_shells.deployments, "AttentionWorkerReplica", SimpleNamespace)
    monkeypatch.setattr(app, "check_redis", lambda *_, **__: None)
    monkeypatch.setattr(actors.ray_shells.deployments.serve, "deployment", lambda **_: lambda _: _Bound(given))
    monkeypatch.setattr(actors.ray_shells.deployments.serve, "ingress", lambda: lambda cls: cls)
    app.build_as(load_config(None, SECRETS), served_as=None)
    return given


class _Bound:
    """A deployment that only notes what it is made with: the worker's comes first, then the front end's."""

    def __init__(self, given: dict[str, list[object]]) -> None:
        self._given = given

    def bind(self, *args: object) -> str:
        name = "front end" if "worker" in self._given else "worker"
        self._given.setdefault(name, []).extend(args)
        return "an application"


def test_keys_reach_front_ends_only_and_the_password_only_who_counts(started: dict[str, list[object]]) -> None:
    found = {name: secrets_in(values) for name, values in started.items()}
    assert found == {
        "hosts": set(),
        "shelves": {PASSWORD},
        "scheduler": {PASSWORD},
        "worker": {PASSWORD},
        "gateway": {CLIENT, OPERATOR},
        "front end": {CLIENT, OPERATOR},
    }


def test_tree_of_front_ends_has_no_password() -> None:
    assert PASSWORD not in str(without_store(to_tree(load_config(None, SECRETS))))


def test_what_children_inherit_has_no_secrets() -> None:
    environment = {
        "MOESAIC__FRONTEND__API_KEY": CLIENT,
        "moesaic__frontend__operator_key": OPERATOR,
        "MOESAIC__REDIS__URL": PASSWORD,
        "MOESAIC_API_KEY": CLIENT,
        "MOESAIC_OPERATOR_KEY": OPERATOR,
        "MOESAIC__MODEL__PATH": "moesaic-demo",
        "PATH": "/bin",
    }
    take_secrets_from(environment)
    assert environment == {"MOESAIC__MODEL__PATH": "moesaic-demo", "PATH": "/bin"}


def test_every_secret_field_is_a_key_that_is_taken_out() -> None:
    """A new SecretStr must be put on the list."""
    from pydantic import SecretStr

    from cluster.config.load import KEY_FIELDS, MoesaicConfig

    found = {
        name
        for section in MoesaicConfig.model_fields.values()
        for name, field in section.annotation.model_fields.items()  # type: ignore[union-attr]
        if SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))
    }
    assert found == set(KEY_FIELDS)
