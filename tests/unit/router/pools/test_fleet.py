"""What a fleet learns from its pools about adapters, before a router sends turns that need them."""

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from prefillshare.kvshare import config
from prefillshare.kvshare.errors import Unavailable
from prefillshare.kvshare.metrics import Metrics
from prefillshare.router.pools.fleet import Fleet


class Replicas:
    """In the place of a ReplicaSet: `problems` by adapter, for those that are asked about."""

    def __init__(self, **problems: str):
        self.problems, self.asked = problems, None

    async def adapter_problems(self, names, timeout_s, replicas):
        self.asked = (sorted(names), timeout_s, replicas)
        return {name: why for name, why in self.problems.items() if name in names}


@pytest.fixture
def deployment(model, adapter):
    folders = {name: str(adapter(name)) for name in "abc"}
    pools = [
        {"pool": "agents", "replicas": 3, "adapters": {"a": folders["a"]}},
        {"pool": "alone", "sharing": "none", "adapters": {"b": folders["b"]}},
        {"pool": "coming", "adapters": {"c": folders["c"]}},
        {"pool": "full", "model": str(model("full"))},
    ]
    whole = {"base": {"model": str(model()), "max_model_len": 64}, "decode": pools, "cluster": {"start_timeout_s": 7}}
    return config.parse(whole)


@pytest.mark.parametrize(("of_all", "of_agents"), [(True, 3), (False, 1)])
async def test_every_engine_that_serves_adapters_is_asked_once_it_is_known(deployment, of_all, of_agents):
    fleet = Fleet(32, lambda name: None, None)
    sets = {name: Replicas() for name in ("prefill", "agents", "alone", "prefill-alone", "full")}
    sets["agents"].problems, sets["prefill-alone"].problems = {"a": "one"}, {"b": "two"}
    fleet.pools = {name: SimpleNamespace(replicas=replicas) for name, replicas in sets.items()}
    assert await fleet.adapter_problems(deployment, of_all) == {"a": "one", "b": "two"}
    assert {name: replicas.asked for name, replicas in sets.items()} == {
        "prefill": None,
        "agents": (["a"], 7, of_agents),
        "alone": (["b"], 7, 1),
        "prefill-alone": (["b"], 7, 1),
        "full": None,
    }


class Closing:
    def __init__(self):
        self.closed = 0

    async def close(self):
        self.closed += 1


async def test_pools_that_nothing_draws_on_any_more_are_forgotten_the_shared_one_too(deployment):
    fleet = Fleet(32, lambda name: None, Metrics(CollectorRegistry()))
    pools = {name: Closing() for name in ("prefill", "agents", "alone", "prefill-alone", "coming", "full")}
    fleet.pools = dict(pools)
    for name in pools:
        fleet._count(name, SimpleNamespace(members={}))

    def without(*gone: str):
        return deployment.model_copy(update={"decode": tuple(p for p in deployment.decode if p.pool not in gone)})

    await fleet.forget(without("alone"))
    assert fleet.pools.keys() == {"prefill", "agents", "coming", "full"}
    assert fleet.shared_prefill() is pools["prefill"]
    await fleet.forget(without("agents", "coming", "full"))
    assert not fleet.pools
    assert [pool.closed for pool in pools.values()] == [1] * 6
    with pytest.raises(Unavailable, match="there is no shared prefill pool"):
        fleet.shared_prefill()
