"""Renders the Helm chart, and shows what KubeRay makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from helm_python import Chart

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/prefillshare"
RELEASE = "agents"


def rendered(values: dict) -> list[dict]:
    with Chart.load(CHART) as chart:
        files = chart.render(values=values, name=RELEASE, namespace="models")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(documents: list[dict], kind: str) -> list[dict]:
    return [document for document in documents if document["kind"] == kind]


def groups(documents: list[dict]) -> dict[str, dict]:
    """Component -> its group spec in the RayCluster; that of the head is "head"."""
    (service,) = of_kind(documents, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def pods(documents: list[dict]) -> dict[str, dict]:
    """Component -> pod template."""
    templates = [group["template"] for group in groups(documents).values()]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in templates}


def serve_config(documents: list[dict]) -> dict:
    """What KubeRay sends to Ray's dashboard by PUT, http://HEAD:8265/api/serve/applications/."""
    (service,) = of_kind(documents, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def ray_start(group: dict, **more: str) -> str:
    """The shell command by which KubeRay starts Ray in a pod of the group; without an `address` to join, in the head's pod.

    Source: ray-operator/controllers/ray/common/pod.go, generateRayStartCommand
    """
    parameters: Mapping[str, str] = {**group["rayStartParams"], **more}
    start = ["ray start"] if "address" in parameters else ["ray start --head"]
    return " ".join([*start, *(f"--{name}={value}" for name, value in parameters.items()), "--block"])
