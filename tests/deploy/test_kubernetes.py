"""The KubeRay manifests match the published schema, and their settings are safe on a shared cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"


def documents(kind: str) -> list[dict[str, Any]]:
    return [
        document
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if document["kind"] == kind
    ]


def clusters() -> list[dict[str, Any]]:
    return [
        *(document["spec"] for document in documents("RayCluster")),
        *(document["spec"]["rayClusterSpec"] for document in documents("RayJob")),
    ]


def pod_templates() -> list[dict[str, Any]]:
    templates = [document["spec"]["submitterPodTemplate"] for document in documents("RayJob")]
    for cluster in clusters():
        templates += [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return templates


def containers() -> list[dict[str, Any]]:
    return [container for template in pod_templates() for container in template["spec"]["containers"]]


def strict(schema: Any) -> Any:
    """Return the schema without support for unknown keys, which Kubernetes would silently drop."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def schema_of(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"the published schemas are not at {path}")
    content = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)  # a tenth of safe_load's five seconds
    versions = {version["name"]: version for version in content["spec"]["versions"]}
    schema = strict(versions["v1"]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"].pop("additionalProperties", None)
    return schema


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_published_schema_accepts_them(kind):
    validator = jsonschema.Draft202012Validator(schema_of(kind))
    assert documents(kind)
    for document in documents(kind):
        assert document["apiVersion"] == "ray.io/v1"
        validator.validate(document)
        document["spec"]["backofLimit"] = 2
        with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
            validator.validate(document)


def test_tokens_are_asked_for_and_nobody_is_invited():
    for cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "adapeft-ray-token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert "enableIngress" not in cluster["headGroupSpec"]


def test_ray_is_the_version_of_the_image():
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert {cluster["rayVersion"] for cluster in clusters()} == {pinned[1]}
    assert len({container["image"] for container in containers()}) == 1


def test_requests_equal_limits():
    sizes = [container["resources"] for container in containers()]
    sizes += [cluster["autoscalerOptions"]["resources"] for cluster in clusters() if "autoscalerOptions" in cluster]
    assert len(sizes) > len(clusters())
    for size in sizes:
        assert size["requests"] == size["limits"]
        assert {"cpu", "memory"} <= size["limits"].keys()


def test_nothing_runs_as_root_or_becomes_it():
    for template in pod_templates():
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        for container in template["spec"]["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_secrets_are_referred_to():
    for container in containers():
        for variable in container.get("env", []):
            if re.search("TOKEN|SECRET|KEY|PASSW", variable["name"]):
                assert "value" not in variable
                assert "secretKeyRef" in variable["valueFrom"]
    assert not documents("Secret")


def test_the_policy_covers_every_pod():
    (policy,) = documents("NetworkPolicy")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    wanted = policy["spec"]["podSelector"]["matchLabels"]
    for template in pod_templates():
        assert wanted.items() <= template["metadata"]["labels"].items()
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "an empty list is everybody"
        assert not any("ipBlock" in peer for peer in rule["from"])


def test_the_volume_claim_is_the_one_that_is_mounted():
    (claim,) = documents("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounted = {
        volume["persistentVolumeClaim"]["claimName"]
        for template in pod_templates()
        for volume in template["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert mounted == {claim["metadata"]["name"]}


def test_a_cluster_that_stays_grows_with_its_runs():
    for document in documents("RayCluster"):
        assert document["spec"]["enableInTreeAutoscaling"]
        assert all(group["minReplicas"] < group["maxReplicas"] for group in document["spec"]["workerGroupSpecs"])
