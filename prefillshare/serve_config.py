"""Applications that Ray Serve deploys from a config file, as KubeRay has it do.

Serve gives all parts of such an application the version of the file, so that any change of it would replace every engine. A
part's config keeps its own version instead: it decides what has to be replaced, as where an application is deployed by a call.

Seam: ray/serve/_private/deploy_utils.py (get_deploy_args sets `deployment_config.version`), ray/serve/schema.py
"""

from __future__ import annotations

from ray.serve._private.config import DeploymentConfig
from ray.serve.context import _get_global_client
from ray.serve.schema import APIType


class _Versioned(DeploymentConfig):
    def __setattr__(self, name: str, value) -> None:
        if name != "version":
            super().__setattr__(name, value)


def keep_version(config: DeploymentConfig, version: str) -> DeploymentConfig:
    """The same, with a version that stays."""
    return _Versioned.model_construct(**dict(config) | {"version": version})


def is_from_config(application: str) -> bool:
    """Whether what runs under that name was deployed from a config file."""
    return _get_global_client().get_serve_details()["applications"][application]["source"] == APIType.DECLARATIVE
