"""The chart's values.schema.json: `python deploy/helm/values_schema.py` writes it from the models below and from the config
tree, so that a wrong key or value of either is refused by `helm install`, with its place named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from prefillshare.kvshare.config import Deployment

FILE = Path(__file__).parent / "prefillshare" / "values.schema.json"

#: What Kubernetes itself checks.
Kubernetes = dict[str, Any]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?([KMGTPE]i?|m)?$")]
Labels = dict[str, str]


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SecretKey(_Values):
    secretName: str = ""
    secretKey: str = ""


class Image(_Values):
    repository: Annotated[str, Field(min_length=1)]
    tag: str
    digest: Annotated[str, StringConstraints(pattern=r"^(sha256:[0-9a-f]{64})?$")]
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]


class Download(_Values):
    repo: str = ""
    revision: str = "main"
    url: str = ""
    folder: Annotated[str, Field(min_length=1, pattern=r"^[^/.][^/]*$")]


class Models(_Values):
    mountPath: Annotated[str, Field(pattern="^/")]
    existingClaim: str
    hostPath: str
    download: list[Download]
    downloadSize: Quantity
    downloadEnv: list[Kubernetes]
    hubToken: SecretKey


class Keys(_Values):
    keysFile: SecretKey


class Certificates(_Values):
    secretName: str
    certKey: str
    keyKey: str
    clientCaKey: str


class Resources(_Values):
    requests: dict[str, Quantity | int] = {}
    limits: dict[str, Quantity | int] = {}


class RedisPod(_Values):
    enabled: bool
    image: Annotated[str, Field(min_length=1)]
    maxmemory: Annotated[str, StringConstraints(pattern=r"^[0-9]+(kb|mb|gb)$")]
    storage: Quantity
    storageClassName: str
    resources: Resources
    nodeSelector: Labels
    tolerations: list[Kubernetes]


class Redis(_Values):
    password: SecretKey
    deploy: RedisPod


class Pods(_Values):
    # Whole numbers: Ray's autoscaler takes no others.
    rayResources: dict[str, Annotated[int, Field(ge=1)]]
    resources: Resources = Resources()
    shmSize: Quantity = "4Gi"
    nodeSelector: Labels = {}
    tolerations: list[Kubernetes] = []
    affinity: Kubernetes = {}
    annotations: Labels = {}
    labels: Labels = {}
    env: list[Kubernetes] = []
    priorityClassName: str = ""
    topologySpreadConstraints: list[Kubernetes] = []
    extraContainers: list[Kubernetes] = []
    extraVolumes: list[Kubernetes] = []
    extraVolumeMounts: list[Kubernetes] = []


class Devices(_Values):
    resource: Annotated[str, Field(min_length=1)]
    count: Annotated[int, Field(ge=0)]


class Rdma(Devices):
    enabled: bool


class Workers(Pods):
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=1)]
    gpus: Devices | None = None
    rdma: Rdma | None = None
    runtimeClassName: str = ""


class Autoscaling(_Values):
    enabled: bool
    idleTimeoutSeconds: Annotated[int, Field(ge=1)]


class ServiceAccount(_Values):
    create: bool
    name: str
    annotations: Labels


class Service(_Values):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    annotations: Labels


class Ingress(_Values):
    enabled: bool
    className: str
    httpHost: str
    grpcHost: str
    annotations: Labels
    grpcAnnotations: Labels
    tls: list[Kubernetes]


class NetworkPolicy(_Values):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    enabled: bool
    from_: Annotated[list[Kubernetes], Field(alias="from")]
    metricsFrom: list[Kubernetes]


class PodDisruptionBudget(_Values):
    enabled: bool
    maxUnavailable: Annotated[int, Field(ge=1)]


class PodMonitor(_Values):
    enabled: bool
    interval: Annotated[str, Field(pattern=r"^\d+(ms|s|m)$")]
    labels: Labels
    rayMetrics: list[str]


class Objectives(_Values):
    ttftSeconds: Annotated[float, Field(gt=0)]
    turnSeconds: Annotated[float, Field(gt=0)]


class PrometheusRule(_Values):
    enabled: bool
    labels: Labels
    objectives: Objectives


class Dashboards(_Values):
    enabled: bool
    label: str
    labelValue: str
    annotations: Labels


class Monitoring(_Values):
    podMonitor: PodMonitor
    prometheusRule: PrometheusRule
    dashboards: Dashboards


class Values(_Values):
    image: Image
    imagePullSecrets: list[Kubernetes]
    nameOverride: str
    fullnameOverride: str
    rayVersion: str
    deployment: Deployment
    models: Models
    auth: Keys
    tls: Certificates
    redis: Redis
    head: Pods
    workers: Annotated[dict[Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9-]*$")], Workers], Field(min_length=1)]
    autoscaling: Autoscaling
    serviceAccount: ServiceAccount
    podSecurityContext: Kubernetes
    securityContext: Kubernetes
    service: Service
    ingress: Ingress
    networkPolicy: NetworkPolicy
    podDisruptionBudget: PodDisruptionBudget
    monitoring: Monitoring
    extraObjects: list[Kubernetes | str]
    #: Helm's own.
    global_: Annotated[Kubernetes, Field(alias="global")] = {}


def rendered() -> str:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Values.model_json_schema(by_alias=True)}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(rendered())
