"""What may change of a deployment while it runs, as far as its file says."""

import pytest

from kvshare import config
from kvshare.errors import ConfigError
from prefillshare.app import _replicas, check_change


@pytest.fixture
def deploy(model, adapter):
    base = model("base")
    folders = {name: str(adapter(name, base=base)) for name in ("a", "b")}

    def make(**pool):
        pool = {"pool": "agents", "adapters": {"a": folders["a"]}} | pool
        return config.parse({"base": {"model": str(base), "dtype": "float32", "max_model_len": 64}, "decode": [pool]})

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
