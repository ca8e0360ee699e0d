"""Kubernetes manifests and the systemd unit, as far as that goes without Kubernetes.

Kubernetes' own kinds, and the pods inside the RayCluster, are checked against the schemas of a Kubernetes release; the
RayCluster itself against the fields of KubeRay's definition that it uses. Nothing checks what an operator does with it.
"""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from kvferry.deploy.settings import Settings

DEPLOY = Path(__file__).parents[3] / "deploy"
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "kvferry.yaml").read_text()))
KUBERNETES = "1.33"

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
TEMPLATE = {"type": "object", "required": ["spec"], "properties": {"metadata": {}, "spec": {}}}
RAY_CLUSTER = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["headGroupSpec"],
            "properties": {
                "rayVersion": {"type": "string"},
                "authOptions": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"mode": {"enum": ["disabled", "token"]}},
                },
                "gcsFaultToleranceOptions": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["redisAddress"],
                    "properties": {
                        "redisAddress": {"type": "string"},
                        "redisPassword": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {"value": {"type": "string"}, "valueFrom": {"type": "object"}},
                        },
                    },
                },
                "headGroupSpec": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["template"],
                    "properties": {"rayStartParams": STRINGS, "template": TEMPLATE},
                },
                "workerGroupSpecs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["groupName", "template", "minReplicas", "maxReplicas"],
                        "properties": {
                            "groupName": {"type": "string"},
                            "replicas": {"type": "integer"},
                            "minReplicas": {"type": "integer"},
                            "maxReplicas": {"type": "integer"},
                            "rayStartParams": STRINGS,
                            "template": TEMPLATE,
                        },
                    },
                },
            },
        },
    },
}


def manifest(kind: str, name: str) -> dict[str, Any]:
    return next(m for m in MANIFESTS if m["kind"] == kind and m["metadata"]["name"] == name)


def settings(tmp_path: Path) -> Settings:
    path = tmp_path / "kvferry.yaml"
    path.write_text(manifest("ConfigMap", "kvferry")["data"]["kvferry.yaml"])
    return Settings.load(path)


def pods_of_ray() -> list[dict[str, Any]]:
    spec = manifest("RayCluster", "kvferry")["spec"]
    templates = [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template} for template in templates]


@pytest.mark.parametrize(
    "content",
    [m for m in MANIFESTS if m["kind"] != "RayCluster"] + pods_of_ray(),
    ids=lambda m: f"{m['kind']}-{m['metadata'].get('name', 'of-ray')}",
)
def test_kubernetes_kinds_match_their_schemas(content: dict[str, Any]) -> None:
    kubernetes_validate.validate(content, KUBERNETES, strict=True)


def test_the_ray_cluster_matches_the_fields_of_its_definition() -> None:
    cluster = manifest("RayCluster", "kvferry")
    jsonschema.validate(cluster, RAY_CLUSTER)
    for wrong in ({"rayStartParams": {"num-cpus": 0}}, {"template": None}, {"rayStartParam": {}}):
        head = cluster["spec"]["headGroupSpec"] | wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**cluster, "spec": {**cluster["spec"], "headGroupSpec": head}}, RAY_CLUSTER)


def test_the_parts_name_each_other(tmp_path: Path) -> None:
    values = settings(tmp_path)
    spec = manifest("RayCluster", "kvferry")["spec"]
    machines = 1 + sum(group["minReplicas"] for group in spec["workerGroupSpecs"])
    assert values.cluster.machines == machines == values.store.count
    assert values.cluster.bind == "machine" and values.gateway.count == 0
    name, _, port = str(values.cluster.directory).partition(":")
    assert manifest("Service", name)["spec"]["ports"][0]["port"] == int(port)
    assert manifest("Service", "kvferry")["spec"]["ports"][0]["port"] == values.gateway.port
    redis = spec["gcsFaultToleranceOptions"]["redisAddress"].partition(":")[0]
    assert manifest("Service", redis)
    for service in (m for m in MANIFESTS if m["kind"] == "Service"):
        selector = service["spec"]["selector"]
        owners = [m for m in MANIFESTS if m["kind"] in ("Deployment", "StatefulSet")]
        assert any(m["spec"]["template"]["metadata"]["labels"] == selector for m in owners), service["metadata"]["name"]


def test_services_are_probed_and_guarded() -> None:
    for owner in (m for m in MANIFESTS if m["kind"] in ("Deployment", "StatefulSet")):
        (container,) = owner["spec"]["template"]["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe", "resources"} <= container.keys(), owner["metadata"]["name"]
    budget = manifest("PodDisruptionBudget", "kvferry-gateway")["spec"]
    gateway = manifest("Deployment", "kvferry-gateway")["spec"]
    assert budget["selector"] == gateway["selector"] and budget["minAvailable"] < gateway["replicas"]
    assert manifest("PodDisruptionBudget", "kvferry-worker")


def test_the_gateway_drains_before_it_is_killed() -> None:
    pod = manifest("Deployment", "kvferry-gateway")["spec"]["template"]["spec"]
    drain = next(a for a in pod["containers"][0]["args"] if a.startswith("--drain-timeout="))
    assert float(drain.partition("=")[2]) < pod["terminationGracePeriodSeconds"]


def test_no_secret_is_in_the_manifests() -> None:
    assert not [m for m in MANIFESTS if m["kind"] == "Secret"]
    assert all("value" not in e or "PASSWORD" not in e["name"] for m in MANIFESTS for e in _environments(m))


def _environments(part: Any) -> list[dict[str, Any]]:
    if isinstance(part, dict):
        own = part.get("env", []) if isinstance(part.get("env"), list) else []
        return own + [e for value in part.values() for e in _environments(value)]
    return [e for item in part for e in _environments(item)] if isinstance(part, list) else []


def test_the_systemd_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "kvferry.service").read_text()
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    assert unit["Service"]["ExecStart"].split()[1:3] == ["serve", "--config"]
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("the rest needs systemd-analyze")
    path = tmp_path / "kvferry.service"
    path.write_text(text.replace("/opt/kvferry/bin/kvferry", "/bin/true"))  # it is not installed here
    done = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(text.replace("/opt/kvferry/bin/kvferry", "/bin/true").replace("KillMode=mixed", "KilMode=mixed"))
    done = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, timeout=60)
    assert "KilMode" in done.stderr
