from __future__ import annotations

import copy

from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deploy_utils import deploy_args_to_deployment_info, get_deploy_args

from prefillshare.serve_config import keep_version


def test_a_version_outlives_the_one_that_serve_gives_to_all_parts_of_a_config_file(monkeypatch):
    monkeypatch.setattr("ray.get_runtime_context", lambda: type("Context", (), {"get_job_id": lambda self: "01000000"})())
    config = keep_version(DeploymentConfig(num_replicas=3, user_config={"adapters": {"a": "/a"}}), "own")
    replica = ReplicaConfig.create(object)
    args = get_deploy_args("prefill", replica, deployment_config=copy.deepcopy(config), version="the file's")
    info = deploy_args_to_deployment_info(**args, app_name="prefillshare")
    assert info.version == "own"
    assert info.deployment_config.num_replicas == 3
    assert info.deployment_config.user_config == {"adapters": {"a": "/a"}}
