"""Cache domains and salts (R7): who may choose which, and that no two of them give one salt."""

import asyncio
import contextvars
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefillshare.kvshare.caller import ANONYMOUS, Caller, cache_salt, current_caller
from prefillshare.kvshare.errors import InvalidInput, PermissionDenied

RESEARCH = Caller("research", "research", ("handbook", "drafts"), priority=3)

domains = st.text(max_size=6)
salts = st.none() | st.text(max_size=6)


@given(domains, salts, domains, salts)
def test_different_domains_and_client_salts_give_different_salts(domain, client, other_domain, other_client):
    same = (domain, client) == (other_domain, other_client)
    assert (cache_salt(domain, client) == cache_salt(other_domain, other_client)) is same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", None), ("a", "")),
        (("a", None), ("", "a")),
        (("", None), ("", "")),
        # A client that knows how salts are made cannot send another domain's.
        (("a", None), ("b", cache_salt("a"))),
        (("a", None), ("", cache_salt("a"))),
    ],
)
def test_pairs_that_look_alike_give_different_salts(one, other):
    assert cache_salt(*one) != cache_salt(*other)


def test_salts_are_the_same_on_every_router_and_after_every_restart():
    assert cache_salt("research") == "a302185e7f591408be221fe7310c6b6b573c1ee9d3c7ae965a1a441965bbda07"
    assert cache_salt("research", "mine") == "a955b444726389e0bd455965a39b38b5bf29e4c40ec238b83a23366060172238"


def test_deployments_without_tenants_keep_unsalted_keys():
    assert cache_salt(ANONYMOUS.cache_domain) is None


def test_salt_of_any_text_is_one_that_engines_take():
    for client in ("", "x" * 1000, "\ud800", "\0/@\\"):
        assert len(cache_salt("d", client)) == 64
        assert cache_salt("d", client).isalnum()


@pytest.mark.parametrize(("chosen", "domain"), [("", "research"), ("research", "research"), ("handbook", "handbook")])
def test_own_domain_is_the_default_and_shared_ones_are_chosen(chosen, domain):
    assert RESEARCH.in_domain(chosen).cache_domain == domain
    assert RESEARCH.in_domain(chosen).tenant == "research"


@pytest.mark.parametrize(
    ("caller", "text"),
    [
        (RESEARCH, "cache_domain: cache domain 'support' is not among those this caller may use "
                   "(fix: leave it out, or use one of research, handbook, drafts)"),
        (ANONYMOUS, "cache_domain: cache domain 'support' is not among those this caller may use (fix: leave it out)"),
    ],
    ids=["tenant", "anonymous"],
)
def test_choosing_another_domain_is_denied(caller, text):
    with pytest.raises(PermissionDenied) as caught:
        caller.in_domain("support")
    assert str(caught.value) == text
    assert caught.value.field == "cache_domain"


async def test_tasks_of_a_call_inherit_its_caller_and_other_calls_do_not():
    async def seen():
        await asyncio.sleep(0)
        return current_caller.get().tenant

    async def call():
        current_caller.set(RESEARCH)
        return await asyncio.create_task(seen())

    assert await asyncio.create_task(call(), context=contextvars.Context()) == "research"
    assert current_caller.get() is ANONYMOUS


@pytest.mark.parametrize(("steps", "priority"), [(0, 3), (7, 10), (100, 100)])
def test_a_request_may_go_behind_its_tenants_others(steps, priority):
    assert RESEARCH.behind(steps) == replace(RESEARCH, priority=priority)


@pytest.mark.parametrize("steps", [-1, 101])
def test_a_request_never_goes_before_its_tenants_others(steps):
    with pytest.raises(InvalidInput, match=f"priority: {steps} is out of range"):
        RESEARCH.behind(steps)
