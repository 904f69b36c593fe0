"""What Ray Serve's controller knows of an application; and applications that it deploys from a config file, as with KubeRay.

Serve gives all parts of such an application the version of the file, so that any change of the file would replace every engine.
Here a part's config keeps its own version instead, which decides what is replaced, as if the application were deployed by a
call.

Seam: ray/serve/_private/deploy_utils.py (get_deploy_args sets `deployment_config.version`), ray/serve/schema.py,
ray/serve/_private/controller.py (`get_serve_instance_details`)
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
    """A copy of `config` whose version cannot be changed any more."""
    return _Versioned.model_construct(**dict(config) | {"version": version})


def is_from_config(application: str) -> bool:
    """Whether the running application of this name was deployed from a config file."""
    return _get_global_client().get_serve_details()["applications"][application]["source"] == APIType.DECLARATIVE


def details(application: str, timeout_s: float) -> dict:
    """The running application (ray/serve/schema.py: ApplicationDetails); empty if it does not run. Raises as Ray does."""
    import ray

    asked = _get_global_client()._controller.get_serve_instance_details.remote()
    return ray.get(asked, timeout=timeout_s)["applications"].get(application, {})
