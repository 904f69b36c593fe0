"""What a tenant may take of its limits, in memory and in Redis."""

import pytest

from prefillshare.kvshare import rate_limits
from prefillshare.kvshare.errors import Overloaded
from prefillshare.kvshare.rate_limits import REQUESTS, TOKENS
from prefillshare.router.admission.grant import Demand, TenantShare

ACME = TenantShare("acme", tokens_per_minute=600, turns_per_minute=10)


def asking(prompt=100, cached=0, tenant=ACME) -> Demand:
    return Demand("agents", prompt, cached, tenant=tenant)


async def left(limits, tenant=ACME) -> dict[str, int]:
    """What a turn leaves that needs no tokens."""
    told = rate_limits.listen()
    charge = await limits.take(asking(0, tenant=tenant), 0)
    charge.give_back()
    await charge.settled()
    return {one.what: one.remaining for one in told.standing}


async def refused(limits, demand: Demand, output: int) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        await limits.take(demand, output)
    return caught.value


async def test_a_turn_takes_what_it_is_expected_to_compute_and_generate(stores):
    limits = stores.limits()
    told = rate_limits.listen()
    await limits.take(asking(prompt=300, cached=200), 50)
    turns, tokens = told.standing
    assert (turns.what, turns.limit, turns.remaining, turns.reset_s) == (REQUESTS, 10, 9, pytest.approx(6, abs=0.1))
    assert (tokens.what, tokens.limit, tokens.remaining, tokens.reset_s) == (TOKENS, 600, 450, pytest.approx(15, abs=0.1))


async def test_too_many_tokens_are_refused_with_the_time_when_they_are_there(stores):
    limits = stores.limits()
    await limits.take(asking(), 400)
    told = rate_limits.listen()
    error = await refused(limits, asking(), 100)
    assert error.field == "tenants.acme.tokens_per_minute"
    assert error.message == "of 600 tokens a minute, the 200 that the turn is expected to use are not left"
    assert error.retry_after_s == pytest.approx(10, abs=0.2)
    assert {one.what: one.remaining for one in told.standing} == {REQUESTS: 9, TOKENS: 100}
    await stores.pass_time(error.retry_after_s)
    await limits.take(asking(), 100)
    labels = {"pool": "agents", "reason": "tokens_per_minute"}
    assert stores.registry.get_sample_value("prefillshare_turns_refused_total", labels) == 1


async def test_too_many_turns_are_refused_whatever_they_need(stores):
    limits = stores.limits()
    for _ in range(10):
        (await limits.take(asking(0), 0)).settle(0)
    error = await refused(limits, asking(0), 0)
    assert (error.field, error.message) == ("tenants.acme.turns_per_minute", "10 turns a minute have been taken")
    assert error.retry_after_s == pytest.approx(6, abs=0.2)
    await stores.pass_time(error.retry_after_s)
    await limits.take(asking(0), 0)


async def test_a_refused_turn_takes_nothing(stores):
    limits = stores.limits()
    await limits.take(asking(), 400)
    for _ in range(20):
        await refused(limits, asking(), 100)
    await limits.take(asking(50), 50)


async def test_at_its_end_a_turn_has_taken_what_it_used(stores):
    limits = stores.limits()
    for used, after in ((40, 560), (250, 310)):  # less, and more, than the 200 that were expected
        charge = await limits.take(asking(), 100)
        charge.settle(used)
        charge.give_back()
        charge.settle(0)  # only the first end counts
        await charge.settled()
        assert (await left(limits))[TOKENS] == pytest.approx(after, abs=5)


async def test_a_turn_that_was_not_admitted_gets_all_of_it_back(stores):
    limits = stores.limits()
    charge = await limits.take(asking(), 400)
    charge.give_back()
    await charge.settled()
    assert await left(limits) == {REQUESTS: 9, TOKENS: 600}


async def test_a_turn_larger_than_a_minute_starts_when_the_allowance_is_whole(stores):
    limits = stores.limits()
    charge = await limits.take(asking(900), 100)
    error = await refused(limits, asking(10), 10)
    assert error.retry_after_s == pytest.approx(42, abs=0.2)  # 400 above the minute, and 20 more, at 10 a second
    charge.settle(620)
    await charge.settled()
    assert (await refused(limits, asking(10), 10)).retry_after_s == pytest.approx(4, abs=0.2)


async def test_tenants_do_not_share_limits_and_others_have_none(stores):
    limits = stores.limits()
    await limits.take(asking(), 500)
    await refused(limits, asking(), 500)
    await limits.take(asking(tenant=TenantShare("other", tokens_per_minute=600)), 500)
    told = rate_limits.listen()
    for _ in range(20):
        await limits.take(asking(10**9, tenant=TenantShare("free")), 500)
    assert told.standing == ()


async def test_only_the_limits_that_a_tenant_has_apply(stores):
    limits = stores.limits()
    few = TenantShare("few", turns_per_minute=2)
    told = rate_limits.listen()
    await limits.take(asking(10**9, tenant=few), 1)
    assert [one.what for one in told.standing] == [REQUESTS]
    much = TenantShare("much", tokens_per_minute=10)
    told = rate_limits.listen()
    await limits.take(asking(1, tenant=much), 1)
    assert [one.what for one in told.standing] == [TOKENS]
