"""What may change of a deployment while it runs, as far as its file says."""

import pytest

from kvshare import config
from kvshare.errors import ConfigError
from kvshare.live_changes import fixed_for_router
from prefillshare.app import _replicas
from prefillshare.apply import check_change
from prefillshare.engines import engine_settings


@pytest.fixture
def deploy(model, adapter):
    base = model("base")
    folders = {name: str(adapter(name, base=base)) for name in ("a", "b")}

    def make(cluster=None, **pool):
        pool = {"pool": "agents", "adapters": {"a": folders["a"]}} | pool
        whole = {"base": {"model": str(base), "dtype": "float32", "max_model_len": 64}, "decode": [pool]}
        return config.parse(whole | {"cluster": cluster or {}})

    make.folders = folders
    return make


def test_adapters_come_and_go(deploy):
    check_change(deploy(), deploy(adapters=deploy.folders))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharing": "none"}, "pool 'agents' has another model or sharing mode"),
        ({"adapters": {"a": "b"}}, "adapter 'a' is another one"),
    ],
)
def test_a_name_keeps_its_meaning(deploy, change, message):
    if "adapters" in change:
        change = {"adapters": {"a": deploy.folders["b"]}}
    with pytest.raises(ConfigError, match=message):
        check_change(deploy(), deploy(**change))


@pytest.mark.parametrize(
    ("cluster", "engines_stay", "routers_stay"),
    [({"kv_lease_s": 90}, False, True), ({"kv_load_timeout_s": 5}, True, False), ({"start_timeout_s": 900}, True, True)],
)
def test_a_lease_replaces_engines_and_a_timeout_routers(deploy, cluster, engines_stay, routers_stay):
    before, after = deploy(), deploy(cluster)
    check_change(before, after)
    assert (engine_settings(before) == engine_settings(after)) is engines_stay
    assert (fixed_for_router(before) == fixed_for_router(after)) is routers_stay


def test_another_cluster_is_another_deployment(deploy):
    with pytest.raises(ConfigError, match=r"cluster\.address: it runs on another cluster"):
        check_change(deploy(), deploy({"address": "10.0.0.1:6379"}))


def test_own_layers_may_change_where_the_prefill_pool_keeps_what_they_need(deploy):
    def own(group):
        return deploy(sharing="droidspeak", own_layers={"a": group})

    check_change(own("0-0"), own("none"))
    with pytest.raises(ConfigError, match=r"keeps the inputs of layers \[\], the new own_layers need those of \[1\]"):
        check_change(own("0-0"), own("1-1"))


def test_a_pool_that_has_followed_its_load_is_not_set_back_to_where_it_began(deploy):
    (pool,) = deploy(replicas=2, autoscale={"max_replicas": 4}).decode
    assert _replicas(pool, as_scaled=False)["autoscaling_config"]["initial_replicas"] == 2
    assert _replicas(pool, as_scaled=True)["autoscaling_config"]["initial_replicas"] is None
    (fixed,) = deploy(replicas=2).decode
    assert _replicas(fixed, as_scaled=True) == {"num_replicas": 2}
