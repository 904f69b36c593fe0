"""Which deployments have a shared prefill pool, and which need one."""

import pytest

from prefillshare.kvshare import config
from prefillshare.kvshare.errors import ConfigError


@pytest.fixture
def plain(model, adapter):
    """A deployment of one adapter pool."""
    return {"base": {"model": str(model())}, "decode": [{"pool": "agents", "adapters": {"planner": str(adapter("planner"))}}]}


@pytest.mark.parametrize("sharing", ["prefillshare", "icarus"])
@pytest.mark.parametrize(("prefill", "replicas"), [(None, None), ({"replicas": 0}, None), ({}, 1), ({"replicas": 2}, 2)])
def test_adapter_pools_do_without_a_prefill_pool_unless_one_is_asked_for(plain, sharing, prefill, replicas):
    plain["decode"][0]["sharing"] = sharing
    if prefill is not None:
        plain["prefill"] = prefill
    shared = config.parse(plain).shared_prefill
    assert (shared.replicas if shared else None) == replicas


@pytest.mark.parametrize("other", [{"pool": "full"}, {"pool": "partial", "sharing": "droidspeak"}])
def test_pools_that_cannot_make_base_kv_need_a_prefill_pool(plain, other):
    (folder,) = plain["decode"][0]["adapters"].values()
    what = {"adapters": {"another": folder}} if "sharing" in other else {"model": plain["base"]["model"]}
    plain["decode"].append(other | what)
    assert config.parse(plain).shared_prefill.replicas == 1  # unset: there is one
    with pytest.raises(ConfigError) as refused:
        config.parse(plain | {"prefill": {"replicas": 0}})
    error = str(refused.value)
    assert error.startswith(f"prefill.replicas: 0 leaves nobody to make the KV of pool '{other['pool']}'; only adapter")
    assert "Set it to 1" in error


def test_a_pool_with_prefill_engines_of_its_own_needs_no_shared_ones(plain):
    plain["decode"][0] |= {"sharing": "none"}
    assert config.parse(plain | {"prefill": {"replicas": 0}}).shared_prefill is None
