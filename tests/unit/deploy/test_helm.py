"""The chart: it lints, its examples render to what Kubernetes and KubeRay expect, and wrong values are refused, named."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import redis as redis_client
import yaml
from chart import CHART, RELEASE, ROOT, groups, of_kind, pods, rendered, serve_config
from helm_python import HelmError, lint
from ports import free_port
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from prefillshare.kvshare.config import Deployment

pytestmark = pytest.mark.slow

EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
SPEC = importlib.util.spec_from_file_location("values_schema", ROOT / "deploy/helm/values_schema.py")
values_schema = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = values_schema  # pydantic looks there
SPEC.loader.exec_module(values_schema)


KUBERNETES = "1.31"
_OBJECT, _COUNT = {"type": "object"}, {"type": "integer", "minimum": 0}


def _fields(required: tuple[str, ...] = (), **properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_START = {"type": "object", "additionalProperties": {"type": "string"}}
#: A RayService's spec, of what it may have the part that we use; pod templates are checked as pods.
#: Source: ray-operator/apis/ray/v1/{rayservice,raycluster}_types.go of KubeRay 1.5.1.
RAY_SERVICE = _fields(
    ("serveConfigV2", "rayClusterConfig"),
    serveConfigV2={"type": "string"},
    upgradeStrategy=_fields(("type",), type={"enum": ["NewCluster", "None"]}),
    rayClusterConfig=_fields(
        ("headGroupSpec", "workerGroupSpecs"),
        rayVersion={"type": "string"},
        authOptions=_fields(("mode",), mode={"enum": ["disabled", "token"]}),
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=_fields(
            idleTimeoutSeconds=_COUNT, securityContext=_OBJECT, env={"type": "array"}, volumeMounts={"type": "array"}
        ),
        headGroupSpec=_fields(("rayStartParams", "template"), rayStartParams=_START, template=_OBJECT),
        workerGroupSpecs={"type": "array", "items": _fields(
            ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName={"type": "string"}, replicas=_COUNT, minReplicas=_COUNT, maxReplicas=_COUNT, rayStartParams=_START,
            template=_OBJECT,
        )},
    ),
)  # fmt: skip


def values_of(example: Path) -> dict:
    return yaml.safe_load(example.read_text())


def test_the_schema_is_up_to_date():
    file = CHART / "values.schema.json"
    assert file.read_text() == values_schema.rendered(), "run: python deploy/helm/values_schema.py"


def test_rules_and_dashboards_are_the_projects_own():
    assert (CHART / "files/rules.yaml").resolve() == ROOT / "deploy/prometheus/rules.yaml"
    assert (CHART / "files/grafana").resolve() == ROOT / "deploy/grafana"


def test_only_those_who_are_named_may_scrape_the_agents_and_call_the_surfaces():
    values = values_of(CHART / "examples/one-gpu.yaml")
    named = {what: [{"namespaceSelector": {"matchLabels": {"name": what}}}] for what in ("monitoring", "callers")}
    values["networkPolicy"] = {"metricsFrom": named["monitoring"], "from": named["callers"]}
    (policy,) = of_kind(rendered(values), "NetworkPolicy")
    allowed = {tuple(port["port"] for port in rule.get("ports", ())): rule["from"] for rule in policy["spec"]["ingress"]}
    assert (allowed["metrics",], allowed["serve", "grpc"]) == (named["monitoring"], named["callers"])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_lints(example):
    found = lint(CHART, values=values_of(example))
    assert "ERROR" not in json.dumps(found), found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_examples_deployment_is_the_file_that_serve_takes(example):
    documents = rendered(values_of(example))
    serve = serve_config(documents)
    deployment = Deployment.model_validate(serve["applications"][0]["args"]["deployment"])
    assert deployment == Deployment.model_validate({**values_of(example)["deployment"], "name": RELEASE})
    assert deployment.router.host == "0.0.0.0"
    assert serve["http_options"]["port"] == deployment.router.http_port
    assert serve["applications"][0]["import_path"] == "prefillshare.app:application"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_every_replica_finds_a_group_that_offers_what_it_takes(example):
    values = values_of(example)
    head, *workers = groups(rendered(values)).values()
    started = [group["rayStartParams"]["resources"] for group in (head, *workers)]
    offered = {name for resources in started for name in json.loads(json.loads(resources))}
    deployment = Deployment.model_validate(values["deployment"])
    engines = [*filter(None, [deployment.shared_prefill]), *deployment.decode]
    taken = [deployment.router.resources, *(part.resources for part in engines)]
    assert all(taken)
    assert {name for resources in taken for name in resources} <= offered
    gpus = sum(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0) * group["replicas"]
               for group in workers)  # fmt: skip
    assert gpus >= sum(e.replicas * e.tensor_parallel_size * e.gpu_share for e in engines)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_pods_are_as_operators_expect_them(example):
    for name, pod in pods(rendered(values_of(example))).items():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert container["name"] == ("ray-head" if name == "head" else "ray-worker")
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in spec["volumes"]}
        writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
        assert writable == {"/dev/shm", "/tmp", "/home/prefillshare"}
        assert {port["name"] for port in container["ports"]} >= {"serve", "metrics"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_what_is_rendered_is_what_kubernetes_and_kuberay_take(example):
    documents = rendered(values_of(example))
    own = {"RayService", "PodMonitor", "PrometheusRule"}  # of operators, not of Kubernetes
    for document in documents:
        if document["kind"] not in own:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    (service,) = of_kind(documents, "RayService")
    jsonschema.validate(service["spec"], RAY_SERVICE)
    for name, template in pods(documents).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | template["metadata"], "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_what_kubernetes_does_not_know_would_be_noticed():
    values = values_of(CHART / "examples/one-gpu.yaml")
    values["podSecurityContext"] = {"runAsNonRoott": True}
    pod = pods(rendered(values))["head"]
    with pytest.raises(kubernetes_validate.ValidationError, match="runAsNonRoott"):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **pod}, KUBERNETES, strict=True)


def test_kv_stays_between_our_pods():
    documents = rendered(values_of(CHART / "examples/one-gpu.yaml"))
    (policy,) = of_kind(documents, "NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    inside, metrics, outside, operator = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": selected}}]}
    assert [port["port"] for port in metrics["ports"]] == ["metrics"]
    assert [port["port"] for port in outside["ports"]] == ["serve", "grpc"]
    assert [port["port"] for port in operator["ports"]] == ["dashboard", "serve"]
    for pod in pods(documents).values():
        assert selected.items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_ray_answers_who_has_the_clusters_token_only(example):
    (service,) = of_kind(rendered(values_of(example)), "RayService")
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_secrets_are_only_named():
    documents = rendered(values_of(CHART / "examples/one-prefill-four-decode.yaml"))
    assert not of_kind(documents, "Secret")
    for pod in pods(documents).values():
        secrets = {volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if "secret" in volume}
        assert secrets == {"prefillshare-keys", "prefillshare-tls"}
    assert serve_config(documents)["http_options"]["ssl_certfile"] == "/etc/prefillshare/tls/tls.crt"


def test_rdma_takes_a_device_and_may_lock_memory():
    prefill = pods(rendered(values_of(CHART / "examples/one-prefill-four-decode.yaml")))["prefill"]["spec"]["containers"][0]
    assert prefill["resources"]["limits"]["rdma/hca_shared_devices_a"] == 1
    assert prefill["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
    plain = pods(rendered(values_of(CHART / "examples/icarus-eight-adapters.yaml")))["prefill"]["spec"]["containers"][0]
    assert "add" not in plain["securityContext"]["capabilities"]


def test_models_are_downloaded_before_the_start():
    for pod in pods(rendered(values_of(CHART / "examples/icarus-eight-adapters.yaml"))).values():
        downloads = pod["spec"]["initContainers"]
        assert [one["command"][2] for one in downloads][:2] == ["example/llama-3.1-8b-instruct", "example/agent-1"]
        assert downloads[0]["command"][-1] == "/models/base"
        assert downloads[0]["env"][-1]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}


def test_models_of_object_storage_are_copied(tmp_path):
    """Its library takes folders by the same call."""
    values = values_of(CHART / "examples/icarus-eight-adapters.yaml")
    key = {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "id"}}}
    values["models"] |= {
        "mountPath": str(tmp_path / "models"), "downloadEnv": [key], "hubToken": {},
        "download": [{"url": f"file://{tmp_path}/bucket/planner", "folder": "planner"}],
    }  # fmt: skip
    (tmp_path / "bucket/planner").mkdir(parents=True)
    (tmp_path / "bucket/planner/config.json").write_text("{}")
    (download,) = pods(rendered(values))["decode"]["spec"]["initContainers"]
    assert key in download["env"]
    python, *arguments = download["command"]
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True, timeout=60)
    assert (tmp_path / "models/planner/config.json").read_text() == "{}"


def test_monitoring_brings_the_rules_and_every_dashboard():
    documents = rendered(values_of(CHART / "examples/one-prefill-four-decode.yaml"))
    (rule,) = of_kind(documents, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    values = values_of(CHART / "examples/one-prefill-four-decode.yaml")
    values["monitoring"]["prometheusRule"]["objectives"] = {"ttftSeconds": 1.5, "turnSeconds": 20}
    (rule,) = of_kind(rendered(values), "PrometheusRule")
    recorded = {r["record"]: r["expr"] for r in rule["spec"]["groups"][0]["rules"] if "record" in r}
    assert recorded["prefillshare:ttft_seconds:objective"] == "vector(1.5)"
    assert recorded["prefillshare:turn_seconds:objective"] == "vector(20)"
    boards = [d for d in of_kind(documents, "ConfigMap") if d["metadata"]["labels"].get("grafana_dashboard") == "1"]
    made = {name: json.loads(text) for board in boards for name, text in board["data"].items()}
    assert made == {file.name: json.loads(file.read_text()) for file in (ROOT / "deploy/grafana").glob("*.json")}
    (monitor,) = of_kind(documents, "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pods(documents)["decode"]["metadata"]["labels"].items()
    assert scraped(endpoint, "ray_prefillshare_turns_total") == "prefillshare_turns_total"
    assert scraped(endpoint, "ray_vllm_num_requests_running") == "vllm_num_requests_running"
    assert scraped(endpoint, "ray_node_mem_used") == "ray_node_mem_used"
    for one in ("ray_serve_long_poll_latency_ms_bucket", "ray_tasks", "ray_node_mem", "python_gc_objects_collected_total"):
        assert scraped(endpoint, one) is None


def test_a_user_may_keep_other_metrics_of_rays():
    values = values_of(CHART / "examples/one-prefill-four-decode.yaml")

    def monitored(*kept: str) -> dict:
        values["monitoring"]["podMonitor"]["rayMetrics"] = list(kept)
        (monitor,) = of_kind(rendered(values), "PodMonitor")
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        return endpoint

    assert scraped(monitored(), "ray_node_mem_used") is None
    assert scraped(monitored(), "ray_vllm_num_requests_running") == "vllm_num_requests_running"
    assert scraped(monitored("tasks", ".*_bucket"), "ray_tasks") == "ray_tasks"
    assert scraped(monitored(".*"), "ray_serve_long_poll_latency_ms_bucket")
    assert scraped(monitored(".*"), "python_info") is None


def scraped(endpoint: dict, name: str) -> str | None:
    """The name under which a metric of an agent is stored; None: it is dropped."""
    for rule in endpoint["metricRelabelings"]:
        found = re.fullmatch(rule["regex"], name)
        if rule.get("action") == "keep" and not found:
            return None
        if "targetLabel" in rule and found:
            name = found.expand(rule["replacement"].replace("$", "\\"))
    return name


def router_service(documents: list[dict]) -> dict:
    (service,) = [one for one in of_kind(documents, "Service") if one["metadata"]["name"].endswith("-router")]
    return service


def protocols_of_ingresses(documents: list[dict]) -> dict[str, str]:
    return {
        ingress["spec"]["rules"][0]["host"]: ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/backend-protocol"]
        for ingress in of_kind(documents, "Ingress")
    }


def test_an_ingress_speaks_tls_to_routers_that_do():
    values = values_of(CHART / "examples/one-prefill-four-decode.yaml")
    values["ingress"] = {"enabled": True, "httpHost": "http.example.org", "grpcHost": "grpc.example.org"}
    documents = rendered(values)
    assert protocols_of_ingresses(documents) == {"http.example.org": "HTTPS", "grpc.example.org": "GRPCS"}
    service = router_service(documents)
    assert {port["appProtocol"] for port in service["spec"]["ports"]} == {"https"}


def test_autoscaling_has_its_bounds_and_an_ingress_its_hosts():
    documents = rendered(values_of(CHART / "examples/autoscaling.yaml"))
    (service,) = of_kind(documents, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    bounds = {g["groupName"]: (g["minReplicas"], g["maxReplicas"]) for g in cluster["workerGroupSpecs"]}
    assert bounds == {"decode": (1, 16), "prefill": (1, 4)}
    assert protocols_of_ingresses(documents) == {"models.example.org": "HTTP", "grpc.models.example.org": "GRPC"}
    budgets = {pdb["metadata"]["name"]: pdb["spec"]["minAvailable"] for pdb in of_kind(documents, "PodDisruptionBudget")}
    assert budgets == {"agents-prefillshare-prefill": 0, "agents-prefillshare-decode": 0}


def test_a_redis_of_the_charts_own_is_what_the_routers_ask():
    values = values_of(CHART / "examples/autoscaling.yaml")
    documents = rendered(values)
    (redis,), services = of_kind(documents, "StatefulSet"), of_kind(documents, "Service")
    pod = redis["spec"]["template"]
    host = values["deployment"]["router"]["redis_url"].removeprefix("redis://").split(":")[0]
    (service,) = [service for service in services if service["metadata"]["name"] == host]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (policy,) = of_kind(documents, "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    router = router_service(documents)
    assert not router["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (password,) = pod["spec"]["containers"][0]["env"]
    of_routers = [e for e in pods(documents)["head"]["spec"]["containers"][0]["env"] if "valueFrom" in e]
    assert [e["valueFrom"] for e in of_routers] == [password["valueFrom"]]

    values["deployment"]["router"]["redis_url"] = "redis://elsewhere:6379/0"
    with pytest.raises(HelmError, match="it should be redis://agents-prefillshare-redis:6379/0"):
        rendered(values)


@pytest.mark.parametrize("password", ["", 'it\'s a "secret" #1 \\'])
def test_the_redis_pod_starts_with_its_password_and_keeps_what_it_is_told(password, tmp_path):
    (redis,) = of_kind(rendered(values_of(CHART / "examples/autoscaling.yaml")), "StatefulSet")
    *shell, script = redis["spec"]["template"]["spec"]["containers"][0]["command"]
    data, conf, port = tmp_path / "data", tmp_path / "redis.conf", free_port()
    data.mkdir()
    script = script.replace("/data", str(data)).replace("/tmp/redis.conf", str(conf)).rstrip() + f" --port {port}"

    def with_server(use):
        server = subprocess.Popen([*shell, script], env={"PATH": os.environ["PATH"], "REDIS_PASSWORD": password})
        try:
            client = redis_client.Redis(port=port, password=password or None, retry=Retry(ConstantBackoff(0.1), 100))
            client.ping()
            return use(client)
        finally:
            server.terminate()
            server.wait(10)

    with_server(lambda client: client.set("session", "kept"))
    assert with_server(lambda client: client.get("session")) == b"kept"
    if password:
        with pytest.raises(redis_client.AuthenticationError):
            with_server(lambda _: redis_client.Redis(port=port).ping())
        assert conf.stat().st_mode & 0o077 == 0


def test_a_change_of_the_deployment_changes_no_pod():
    """KubeRay would make a second cluster for it; Ray Serve is told by the arguments of its application."""
    values = values_of(CHART / "examples/one-gpu.yaml")
    before = rendered(values)
    values["deployment"]["decode"][0]["kv_cache_gib"] = 40
    after = rendered(values)
    assert pods(before) == pods(after)
    (old,), (new,) = of_kind(before, "RayService"), of_kind(after, "RayService")
    assert old["spec"]["serveConfigV2"] != new["spec"]["serveConfigV2"]
    assert new["spec"]["upgradeStrategy"] == {"type": "None"}


def test_http_and_grpc_are_both_encrypted_or_neither():
    values = values_of(CHART / "examples/one-prefill-four-decode.yaml")
    del values["tls"]
    with pytest.raises(HelmError, match=r"deployment\.router\.tls\.\w+: tls mounts no such file"):
        rendered(values)


def test_further_objects_are_rendered():
    values = values_of(CHART / "examples/one-gpu.yaml")
    values["extraObjects"] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}, "data": {}}
    ]
    names = {document["metadata"]["name"] for document in of_kind(rendered(values), "ConfigMap")}
    assert "agents-more" in names


@pytest.mark.parametrize(("path", "value", "named"), [
    (("deployment", "prefill", "kv_cache_gb"), 48, "kv_cache_gb"),
    (("deployment", "prefill", "kv_cache_gib"), -1, "kv_cache_gib"),
    (("image", "pullPolicy"), "Sometimes", "pullPolicy"),
    (("workers", "gpu", "replicas"), "two", "replicas"),
    (("wrokers",), {}, "wrokers"),
    (("auth", "keysFile"), {"secret": "keys"}, "secret"),
    (("deployment", "router", "host"), "127.0.0.1", "deployment.router.host"),
    (("deployment", "router", "resources"), {}, "deployment.router.resources"),
    (("deployment", "decode"), [{"pool": "a", "resources": {"decoed": 1}}], "decode.0.resources: no group offers decoed"),
    (("deployment", "base", "model"), "models/llama", "deployment.base.model: .* like /models/base"),
    (("deployment", "router", "http_port"), 8080, "port 8080 is that of the metrics"),
    (("deployment", "prefill", "replicas"), 9, "deployment: its engines take 10 GPUs, but the groups have 1"),
    (("deployment", "prefill"), {"resources": {"gpu": 0.995}}, "decode.0: with its replicas, 1.005 gpu .* groups offer 1"),
    (("deployment", "prefill"), {"resources": {"gpu": 2}}, "prefill: a replica takes 2 gpu .* no pod of a group has them"),
    (("workers", "gpu", "minReplicas"), 2, "workers.gpu: minReplicas <= replicas <= maxReplicas"),
    (("head", "rayResources"), {"router": 0.5}, "rayResources"),
    (("models", "existingClaim"), "", "models: give one of existingClaim, hostPath and download"),
    (("models", "hostPath"), "/models", "models: give one of existingClaim, hostPath and download"),
    (("models",), {"download": [{"folder": "base"}]}, "models.download.0: give repo or url"),
    (("auth", "keysFile"), {"secretName": "keys", "secretKey": "keys.yaml"}, "deployment.router.auth.keys_file"),
    (("deployment", "router", "auth"), {"keys_file": "/keys.yaml"}, "auth.keys_file: auth.keysFile mounts no keys file"),
    (("tls",), {"secretName": "certs", "clientCaKey": "ca.crt"}, "deployment.router.tls.c.*: tls mounts /etc/prefillshare/tls"),
    (("redis", "password"), {"secretName": "redis", "secretKey": "password"}, "deployment.router.redis_password_env"),
])  # fmt: skip
def test_a_wrong_value_is_refused_with_its_place(path, value, named):
    values = values_of(CHART / "examples/one-gpu.yaml")
    *above, last = path
    place = values
    for key in above:
        place = place.setdefault(key, {})
    place[last] = value
    with pytest.raises(HelmError, match=named):
        rendered(values)


def test_routers_are_asked_where_they_run():
    values = values_of(CHART / "examples/autoscaling.yaml")
    values["deployment"]["router"]["replicas"] = 2
    values["head"] = {"rayResources": {"router": None}}
    values["workers"]["routers"] = {"replicas": 2, "minReplicas": 2, "maxReplicas": 2, "rayResources": {"router": 1}}
    documents = rendered(values)
    service = router_service(documents)
    wanted = service["spec"]["selector"].items()
    assert {name for name, pod in pods(documents).items() if wanted <= pod["metadata"]["labels"].items()} == {"routers"}
    for port in service["spec"]["ports"]:
        (container,) = pods(documents)["routers"]["spec"]["containers"]
        assert port["targetPort"] in {there["name"] for there in container["ports"]}


def test_without_a_deployment_nothing_is_installed():
    with pytest.raises(HelmError, match="deployment"):
        rendered({})
