"""What a client, its retries and a turn's waiting are set up with is checked by name, before anything is connected or sent."""

import pytest
from scripted_router import ScriptedRouter, client_of, serving

from prefillshare.client import AsyncClient, Client, Retries
from prefillshare.kvshare.errors import ConfigError, InvalidInput

BOTH = pytest.mark.parametrize("kind", ["sync", "async"])
NO_TIMES = ["x", 0, 0.0, -1, float("nan"), float("inf"), True, [5], 1e300]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("given", "field"),
    [
        *(({"address": value}, "address") for value in (5, None, "", b"127.0.0.1:9000")),
        *(({"timeout_s": value}, "timeout_s") for value in (*NO_TIMES, None)),
        *(({"api_key": value}, "api_key") for value in (5, 0, b"key", ["key"], "a key", "key\n")),
        *(({"retries": value}, "retries") for value in (5, 0, True, "no")),
        *(({"tls": value}, "tls") for value in ("false", 1, None)),
        *(({name: value}, name) for name in ("ca_file", "cert_file", "key_file") for value in (5, b"x", "", "no/such", "a\0b")),
    ],
)
async def test_a_client_is_not_set_up_with_what_cannot_be_meant(kind, given, field):
    with pytest.raises(InvalidInput) as raised:
        kind(**given)
    assert raised.value.field == field
    assert raised.value.fix


@pytest.mark.parametrize("value", [b"-----BEGIN PRIVATE KEY-----\nMIGHAgEA", "-----BEGIN PRIVATE KEY-----\nMIGHAgEA"])
def test_a_key_in_a_paths_place_is_not_shown(value):
    with pytest.raises(ConfigError) as raised:
        Client(key_file=value)
    assert "MIGH" not in str(raised.value)
    with pytest.raises(InvalidInput) as raised:
        Client(api_key=b"psk-secret")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        *(({"most": value}, "retries.most") for value in ("x", -1, 1.5, None, True)),
        *(({name: value}, f"retries.{name}") for name in ("first_pause_s", "longest_pause_s") for value in ("x", -1, None)),
    ],
)
def test_retries_are_counts_and_seconds(given, field):
    with pytest.raises(InvalidInput) as raised:
        Retries(**given)
    assert raised.value.field == field


def test_no_pause_and_no_further_try_can_be_meant():
    assert Retries(most=0, first_pause_s=0, longest_pause_s=0).pause_s(0) is None
    assert Retries(first_pause_s=0).pause_s(2) == 0


@BOTH
@pytest.mark.parametrize("call", ["turn", "choices", "stream"])
@pytest.mark.parametrize("given", [*({"timeout_s": value} for value in NO_TIMES), {"n": "2"}, {"n": [2]}])
async def test_a_turn_that_cannot_be_meant_is_refused_before_anything_is_sent(kind, call, given):
    router = ScriptedRouter()
    async with serving(router) as (_, port), client_of(kind, port) as client:
        session = client.session("s")
        made = getattr(session, call)("planner", text="x", **given)
        with pytest.raises(InvalidInput) as raised:
            await (anext(made) if call == "stream" else made)
    assert [raised.value.field] == list(given)
    assert router.count("Generate") == router.count("GetSession") == 0


@BOTH
async def test_without_a_time_of_its_own_a_turn_has_the_clients(kind):
    async with serving(ScriptedRouter()) as (_, port), client_of(kind, port, timeout_s=20) as client:
        session = await client.create_session()
        assert (await session.turn("planner", text="x", timeout_s=None)).text == "Paris."
        assert (await session.turn("planner", text="x", timeout_s=5, n=1)).text == "Paris."
