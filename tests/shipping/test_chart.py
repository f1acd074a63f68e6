"""The Helm chart: what it renders is what Kubernetes, KubeRay, Ray Serve and our own configuration take."""

from __future__ import annotations

import json
import runpy
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_schemas import problems

from cluster.config.load import from_tree

helm = pytest.importorskip("helm_python", reason="Helm's SDK is in the dev extra; it has wheels for some platforms")

CHART = Path(__file__).parents[2] / "helm" / "moesaic"

FULL: dict[str, Any] = {
    "fullnameOverride": "experts",
    "image": {"repository": "registry.example/moesaic", "tag": "1.2.3", "pullSecrets": ["registry"]},
    "config": {
        "model": {"path": "/models/qwen3"},
        "attention": {"workers": 2, "max_workers": 6, "kv_cache": "2GiB"},
        "experts": {"hosts": 3, "max_hosts": 5, "cache": "10%"},
        "frontend": {"drain_timeout_s": 45, "max_body_bytes": 33554432},
        "grpc": {"port": 50061},
        "scheduler": {"routing": "prefix-affinity"},
    },
    "apiKey": {"existingSecret": "keys", "key": "moesaic"},
    "redis": {"existingSecret": "redis-url"},
    "hfToken": {"existingSecret": "hub"},
    "gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379", "existingSecret": "redis-password"},
    "rayAuth": {"existingSecret": "ray-token"},
    "modelVolume": {"existingClaim": "models"},
    "head": {"priorityClassName": "high", "annotations": {"a": "b"}},
    "attentionWorkers": {
        "resources": {"requests": {"cpu": "7500m"}, "limits": {"cpu": "7500m", "memory": "32Gi", "nvidia.com/gpu": 1}},
        "nodeSelector": {"kind": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname"}}
                ]
            }
        },
        "livenessProbe": {"httpGet": {"path": "/api/healthz", "port": 52365}},
    },
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
    "ingress": {"enabled": True, "className": "nginx", "hosts": [{"host": "llm.example"}]},
    "grpcIngress": {
        "enabled": True,
        "annotations": {"nginx.ingress.kubernetes.io/backend-protocol": "GRPC"},
        "hosts": [{"host": "grpc.llm.example"}],
        "tls": [{"secretName": "tls", "hosts": ["grpc.llm.example"]}],
    },
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaler": {"idleTimeoutSeconds": 120},
}
VALUES = {
    "default": {},
    "full": FULL,
    "hosts-only-scale": {"config": {"experts": {"hosts": 1, "max_hosts": 2}, "grpc": {"enabled": False}}},
}


def _render(values: dict[str, Any], *, name: str = "rel") -> list[dict[str, Any]]:
    with helm.Chart.load(str(CHART)) as chart:
        manifests = chart.render({"requireKubeRay": False} | values, name=name, namespace="serving")
    texts = [text for path, text in manifests.items() if path.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def _one(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def _rayservice(values: dict[str, Any]) -> dict[str, Any]:
    return _one(_render(values), "RayService")["spec"]


def _groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = spec["rayClusterConfig"]
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **workers}


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


@pytest.fixture(params=VALUES)
def values(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VALUES[request.param]


def test_lint_finds_nothing() -> None:
    report = helm.lint(str(CHART))
    assert not report["errors"], report
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_every_manifest_is_what_the_apis_take(values: dict[str, Any]) -> None:
    documents = _render(values)
    checked = [d for d in documents if d["apiVersion"] != "monitoring.coreos.com/v1"]
    assert {d["kind"] for d in checked} >= {"RayService", "Pod"}
    found = {f"{d['kind']} {d['metadata']['name']}": problems(d) for d in checked}
    assert not any(found.values()), found


def test_the_validation_would_find_a_misspelt_field_and_a_wrong_type() -> None:
    service = _one(_render({}), "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    cluster["workerGroupSpecs"][0]["replicas"] = "2"
    _container(cluster["headGroupSpec"])["imagePullPolcy"] = "Always"
    found = "\n".join(problems(service))
    assert "workerGroupSpecs[0].replicas" in found and "imagePullPolcy" in found


def test_serve_gets_a_config_of_known_keys_that_starts_our_application(values: dict[str, Any]) -> None:
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    tree = yaml.safe_load(_rayservice(values)["serveConfigV2"])
    ServeDeploySchema.model_validate(tree)
    (application,) = tree["applications"]
    # Serve ignores keys that it does not know.
    assert set(tree) <= set(ServeDeploySchema.model_fields)
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    assert set(tree["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    module, _, name = application["import_path"].partition(":")
    assert application["import_path"] == "cluster.app:build" and callable(getattr(import_module(module), name))


def test_our_configuration_takes_the_arguments_and_they_say_what_the_values_say(values: dict[str, Any]) -> None:
    tree = yaml.safe_load(_rayservice(values)["serveConfigV2"])
    (application,) = tree["applications"]
    config = from_tree(application["args"])
    wanted = values.get("config", {})
    assert config.attention.workers == wanted.get("attention", {}).get("workers", 1)
    assert config.experts.max_hosts == wanted.get("experts", {}).get("max_hosts")
    assert config.frontend.host == "0.0.0.0" and config.frontend.api_key is None
    assert config.frontend.max_body_bytes == wanted.get("frontend", {}).get("max_body_bytes", 4 * 2**20)
    assert config.attention.threads == (7 if values is FULL else 4), "a pod's cores, not the machine's"
    assert tree["http_options"]["request_timeout_s"] > config.frontend.request_timeout_s


def test_pods_are_as_many_as_the_configuration_says_and_have_what_it_asks_of_ray(values: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources

    spec = _rayservice(values)
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    config, groups = from_tree(application["args"]), _groups(spec)
    most_workers, most_hosts = config.attention.max_workers or 1, config.experts.max_hosts or 0
    sizes = {name: (group["minReplicas"], group["maxReplicas"]) for name, group in groups.items() if name != "head"}
    expected = {"attention-workers": (config.attention.workers, most_workers)}
    if most_hosts:
        expected["expert-hosts"] = (config.experts.hosts, most_hosts)
    assert sizes == expected
    asked = {"attention-workers": config.ray.worker_resources, "expert-hosts": config.ray.host_resources}
    for name in sizes:
        parameters = groups[name]["rayStartParams"]
        # As Ray's autoscaler reads it, and as the shell of the pod does.
        assert _get_custom_resources({}, parameters, name) == asked[name]
        assert json.loads(shlex.split(parameters["resources"])[0]) == asked[name]
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"
    scales = spec["rayClusterConfig"].get("enableInTreeAutoscaling", False)
    assert scales is any(least < most for least, most in sizes.values())
    assert groups["head"]["template"]["spec"]["automountServiceAccountToken"] is scales


def test_secrets_come_from_secrets_under_names_that_the_configuration_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.config.load import load_config

    spec = _rayservice(FULL)
    for name, group in _groups(spec).items():
        env = {item["name"]: item for item in _container(group)["env"]}
        references = {key: item["valueFrom"]["secretKeyRef"] for key, item in env.items() if "valueFrom" in item}
        assert references == {
            "MOESAIC__FRONTEND__API_KEY": {"name": "keys", "key": "moesaic"},
            "MOESAIC__REDIS__URL": {"name": "redis-url", "key": "url"},
            "HF_TOKEN": {"name": "hub", "key": "token"},
        }, name
    monkeypatch.setenv("MOESAIC__FRONTEND__API_KEY", "k")
    monkeypatch.setenv("MOESAIC__REDIS__URL", "redis://r:6379/0")
    config = load_config()
    assert config.frontend.api_key is not None and config.frontend.api_key.get_secret_value() == "k"
    assert config.redis.url == "redis://r:6379/0"
    options = spec["rayClusterConfig"]
    assert options["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    password = options["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert password == {"name": "redis-password", "key": "password"}


def test_pods_run_without_privileges_and_have_time_to_drain(values: dict[str, Any]) -> None:
    spec = _rayservice(values)
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    for name, group in _groups(spec).items():
        pod, container = group["template"]["spec"], _container(group)
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert pod["terminationGracePeriodSeconds"] > from_tree(application["args"]).frontend.drain_timeout_s
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == 8000
        config = from_tree(application["args"])
        assert ports.get("serve-grpc") == (config.grpc.port if config.grpc.enabled else None)


REFUSED = {
    "imagee": ({"imagee": {}}, "imagee"),
    "config.attention.worker": ({"config": {"attention": {"worker": 2}}}, "worker"),
    "config.attention.workers": ({"config": {"attention": {"workers": 0}}}, "workers"),
    "config.experts.hosts": ({"config": {"experts": {"hosts": "two"}}}, "hosts"),
    "config.frontend.api_key": ({"config": {"frontend": {"api_key": "in the clear"}}}, "api_key"),
    "config.ray": ({"config": {"ray": {"namespace": "x"}}}, "ray"),
    "image.pullPolicy": ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
    "apiKey.value": ({"apiKey": {"value": "in the clear"}}, "value"),
    "ingress.hosts": ({"ingress": {"enabled": True}}, "hosts"),
    "limits": ({"head": {"resources": {"limits": {"cpu": None}}}}, "cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_schema_refuses_unknown_keys_and_wrong_values(name: str) -> None:
    values, named = REFUSED[name]
    with pytest.raises(Exception, match=named):
        _render(values)


IMPOSSIBLE = {
    "no KubeRay": ({"requireKubeRay": True}, "KubeRay is not installed"),
    "grace": ({"terminationGracePeriodSeconds": 30}, "must be above config.frontend.drain_timeout_s"),
    "grace, set": ({"config": {"frontend": {"drain_timeout_s": 90}}}, "must be above config.frontend.drain_timeout_s"),
    "gcs": ({"gcsFaultTolerance": {"enabled": True}}, "needs gcsFaultTolerance.redisAddress"),
    "redis": ({"redis": {"existingSecret": "s"}, "config": {"redis": {"url": "redis://r"}}}, "give one"),
    "grpc": ({"config": {"grpc": {"enabled": False}}, "grpcIngress": FULL["grpcIngress"]}, "needs gRPC"),
    "name": ({"fullnameOverride": "7b"}, "must start with a letter"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_work_is_refused_with_the_way_out(name: str) -> None:
    values, reason = IMPOSSIBLE[name]
    with pytest.raises(Exception, match=reason):
        _render(values)


def test_names_leave_room_for_what_kuberay_appends() -> None:
    service = _one(_render({}, name="a-release-with-a-name-that-is-much-longer-than-most"), "RayService")
    assert len(service["metadata"]["name"]) <= 47


def test_the_schema_of_the_configuration_is_up_to_date() -> None:
    module = runpy.run_path(str(CHART.parent / "config_schema.py"))
    written = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]
    assert written == module["config_schema"](), "run `python helm/config_schema.py` and commit what it writes"


def test_the_notes_name_the_service_the_key_and_what_is_missing() -> None:
    def notes(values: dict[str, Any]) -> str:
        with helm.Chart.load(str(CHART)) as chart:
            manifests = chart.render({"requireKubeRay": False} | values, name="rel", namespace="serving")
        (text,) = (text for path, text in manifests.items() if path.endswith("NOTES.txt"))
        return text

    bare, full = notes({}), notes(FULL)
    assert "service/rel-moesaic-serve-svc 8000:8000 50051:50051" in bare
    assert "No API key is set" in bare and "embedded Valkey" in bare
    assert "service/experts-serve-svc 8000:8000 50061:50061" in full and "secret keys" in full
    assert "No API key is set" not in full and "embedded Valkey" not in full
