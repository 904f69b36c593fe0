"""The keys file: what it gives a tenant, what it refuses, and that no key is ever shown."""

import contextlib
import hashlib
import hmac
import json
import logging
import pickle
import traceback

import pytest
import yaml

from prefillshare.kvshare.config.access import Auth
from prefillshare.kvshare.errors import ConfigError, Unauthenticated
from prefillshare.router import tenants
from prefillshare.router.tenants import bearer, digest, new_key

KEY, OTHER, OPERATOR = "psk-first-tenants-key", "psk-second-tenants-key", "psk-for-prometheus-only"
TWO = {"tenants": {"research": {"keys": [KEY]}, "support": {"keys": [OTHER], "priority": -5, "may_share": ["handbook"]}}}


def parse(data, tmp_path) -> tenants.Tenants:
    file = tmp_path / "keys.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return tenants.load(Auth(keys_file=str(file)))


def refusal(data, tmp_path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(data, tmp_path)
    assert caught.value.field == "router.auth.keys_file"
    assert caught.value.__context__ is None
    return caught.value


def test_a_key_names_its_tenant(tmp_path):
    known = parse(TWO, tmp_path)
    assert known.identify(KEY).tenant == "research"
    caller = known.identify(OTHER)
    assert (caller.tenant, caller.cache_domain, caller.may_share, caller.priority) == ("support", "support", ("handbook",), -5)


def test_defaults_are_the_documented_ones(tmp_path):
    tenant = parse(TWO, tmp_path).by_name["research"]
    assert (tenant.weight, tenant.max_in_progress, tenant.max_sessions, tenant.priority) == (1, None, None, 0)
    assert (tenant.cache_domain, tenant.may_share) == (None, ())
    assert (tenant.tokens_per_minute, tenant.turns_per_minute) == (None, None)


def test_the_limits_of_a_tenant_reach_the_queue_and_the_accounts(tmp_path):
    limits = {"max_in_progress": 3, "tokens_per_minute": 10**6, "turns_per_minute": 60}
    share = parse({"tenants": {"a": {"keys": [KEY], "weight": 2, **limits}}}, tmp_path).shares()["a"]
    assert (share.name, share.weight, share.is_limited) == ("a", 2, True)
    assert {name: getattr(share, name) for name in limits} == limits
    assert not parse(TWO, tmp_path).shares()["research"].is_limited


def test_sessions_are_shared_out_by_weight_unless_a_tenant_has_a_number_of_its_own(tmp_path):
    def shares(in_all, **tenants_of_weight):
        rows = {name: {"keys": [f"psk-the-key-of-{name}-is-long"], **more} for name, more in tenants_of_weight.items()}
        return parse({"tenants": rows}, tmp_path).max_sessions(in_all)

    assert shares(100, one={}) == {"one": 100}
    assert shares(100, one={}, two={"weight": 2}) == {"one": 33, "two": 66}
    assert shares(100, one={"weight": 0.001}, two={}) == {"one": 1, "two": 99}
    assert shares(100, one={"max_sessions": 7}, two={}) == {"one": 7, "two": 50}
    assert tenants.load(None).max_sessions(100) == {}


def test_a_tenant_may_live_in_another_domain(tmp_path):
    known = parse({"tenants": {"night": {"keys": [KEY], "cache_domain": "research"}}}, tmp_path)
    assert known.identify(KEY).cache_domain == "research"


def test_without_auth_everybody_is_the_anonymous_tenant():
    known = tenants.load(None)
    assert known.by_name == {}
    for key in (None, "", "whatever"):
        assert (known.identify(key).tenant, known.identify(key).cache_domain) == ("", "")


def test_keys_come_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("KEYS", json.dumps(TWO))
    assert tenants.load(Auth(keys_env="KEYS")).identify(KEY).tenant == "research"


def test_unset_variable_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"router\.auth\.keys_env: environment variable KEYS is not set"):
        tenants.load(Auth(keys_env="KEYS"))


def test_fingerprint_changes_with_keys_and_with_what_a_tenant_may_do(tmp_path):
    first, again = parse(TWO, tmp_path), parse(TWO, tmp_path)
    others = [parse({"tenants": {"research": {"keys": [KEY], **more}}}, tmp_path) for more in ({}, {"weight": 2})]
    others.append(parse({"tenants": {"research": {"keys": [OTHER]}}}, tmp_path))
    assert first.fingerprint == again.fingerprint
    assert len({known.fingerprint for known in (first, *others, tenants.load(None))}) == 5


def test_a_digest_stands_for_its_key_and_is_no_key_itself(tmp_path):
    line = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()
    for written in (line, "sha256:" + line.removeprefix("sha256:").upper()):
        known = parse({"tenants": {"research": {"keys": [written]}}}, tmp_path)
        assert known.identify(KEY).tenant == "research"
        for presented in (line, line.removeprefix("sha256:")):
            with pytest.raises(Unauthenticated):
                known.identify(presented)


def test_an_operators_key_shows_all_and_is_no_tenants(tmp_path):
    known = parse(TWO | {"operator_keys": [OPERATOR]}, tmp_path)
    assert (known.shows_all(OPERATOR), known.shows_all(KEY), known.shows_all(None), known.shows_all("")) == (True, *[False] * 3)
    for call, key in ((known.identify, OPERATOR), (known.shows_all, "psk-nobodys-key-at-all")):
        with pytest.raises(Unauthenticated, match="no tenant has this API key"):
            call(key)
    assert known.names == ("research", "support")
    assert known.fingerprint != parse(TWO, tmp_path).fingerprint
    assert tenants.load(None).shows_all(None)


def test_made_keys_differ_and_fit_their_line(tmp_path):
    (key, line), (another, _) = new_key(), new_key()
    assert key != another
    assert parse({"tenants": {"research": {"keys": [line]}}}, tmp_path).identify(key).tenant == "research"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, "no API key is given"),
        ("", "no API key is given"),
        ("psk-nobodys-key-at-all", "no tenant has this API key"),
    ],
)
def test_unknown_or_missing_key_is_refused_without_showing_it(tmp_path, key, message):
    with pytest.raises(Unauthenticated) as caught:
        parse(TWO, tmp_path).identify(key)
    assert caught.value.message == message
    assert not key or key not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", [KEY, OTHER, "psk-nobodys-key-at-all"])
def test_a_presented_key_is_compared_with_every_digest_whoever_has_it(tmp_path, monkeypatch, key):
    compared = []

    def compare(presented, stored, compare=hmac.compare_digest):
        compared.append((presented, stored))
        return compare(presented, stored)

    known = parse({"tenants": {"a": {"keys": [KEY, "psk-one-more-of-a-tenants"]}, "b": {"keys": [OTHER]}}}, tmp_path)
    monkeypatch.setattr(tenants.hmac, "compare_digest", compare)
    with contextlib.suppress(Unauthenticated):
        known.identify(key)
    stored = [digest(k) for k in (KEY, "psk-one-more-of-a-tenants", OTHER)]
    assert compared == [(digest(key), one) for one in stored]


def test_no_key_is_in_what_is_kept_shown_or_sent_to_another_process(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    known = parse(TWO, tmp_path)
    known.identify(KEY)
    sent = pickle.dumps(known)
    shown = f"{known.by_name!r} {known.by_name} {known!r} {vars(known)!r} {known.identify(KEY)!r} {caplog.text}"
    for key in (KEY, OTHER):
        assert key not in shown
        assert key.encode() not in sent
    assert pickle.loads(sent).identify(OTHER).tenant == "support"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, "tenants: required, but not given"),
        ({"tenants": {}}, "tenants: should have at least one entry"),
        ({"tenants": {"a": {}}}, "tenants.a.keys: required, but not given"),
        ({"tenants": {"a": {"keys": []}}}, "tenants.a.keys: should have at least one entry"),
        ({"tenants": {"a": {"keys": [""]}}}, "tenants.a.keys.0: an empty key; remove it"),
        ({"tenants": {"a": {"keys": [KEY, "short"]}}}, "tenants.a.keys.1: 5 characters; a key has 16 to 512"),
        ({"tenants": {"a": {"keys": ["x" * 513]}}}, "tenants.a.keys.0: 513 characters; a key has 16 to 512"),
        ({"tenants": {"a": {"keys": ["a key with spaces in it"]}}}, "tenants.a.keys.0: a key is made of ASCII letters"),
        ({"tenants": {"a": {"keys": [1234567890123456]}}}, "tenants.a.keys.0: a key is text; put it between quotes"),
        ({"tenants": {"a": {"keys": ["sha256:beef"]}}}, "tenants.a.keys.0: a digest is sha256: and 64 hexadecimal digits"),
        ({"tenants": {"a": {"keys": [KEY, KEY]}}}, "tenants.a.keys.1 is the same key as tenants.a.keys.0"),
        (
            {"tenants": {"a": {"keys": [KEY]}, "b": {"keys": ["sha256:" + digest(KEY).hex()]}}},
            "tenants.b.keys.0 is the same key as tenants.a.keys.0; a key belongs to one tenant, once",
        ),
        ({"tenants": {"a": {"keys": [KEY]}}, "operator_keys": ["short"]}, "operator_keys.0: 5 characters; a key has 16 to 512"),
        (
            {"tenants": {"a": {"keys": [KEY]}}, "operator_keys": [KEY]},
            "operator_keys.0 is the same key as tenants.a.keys.0; a key belongs to one tenant, once",
        ),
        ({"tenants": {"a": {"keys": [KEY], "wieght": 2}}}, "tenants.a: unknown key; did you mean 'weight'?"),
        ({"tenant": {}}, "unknown key; did you mean 'tenants'?"),
        ({"tenants": {"a": {"keys": [KEY], "weight": 0}}}, "tenants.a.weight: Input should be greater than 0, got a number"),
        ({"tenants": {"a": {"keys": [KEY], "priority": 101}}}, "tenants.a.priority: Input should be less than or equal to 100"),
        ({"tenants": {"a": {"keys": [KEY], "priority": -101}}}, "tenants.a.priority: Input should be greater than or equal"),
        ({"tenants": {"a": {"keys": [KEY], "max_in_progress": 0}}}, "tenants.a.max_in_progress: Input should be greater than"),
        (
            {"tenants": {"a": {"keys": [KEY], "tokens_per_minute": 0}}},
            "tenants.a.tokens_per_minute: Input should be greater than or equal to 1",
        ),
        (
            {"tenants": {"a": {"keys": [KEY], "turns_per_minute": 1.5}}},
            "tenants.a.turns_per_minute: Input should be a valid integer",
        ),
        ({"tenants": {"a": {"keys": [KEY], "may_share": "handbook"}}}, "tenants.a.may_share: should be a list, got text"),
        ({"tenants": {"a": {"keys": [KEY], "cache_domain": "a b"}}}, "tenants.a.cache_domain: String should match pattern"),
        ({"tenants": {"a b": {"keys": [KEY]}}}, "tenants: String should match pattern"),
        ("tenants: [", "not YAML at line 1, column 11 (not shown: it may hold a key)"),
        ("tenants: {a: {}, a: {}}", "not YAML at line 1, column 18"),
        ("", "a keys file is a mapping with the key tenants"),
    ],
)
def test_refusal_names_the_place_and_what_is_allowed(tmp_path, data, text):
    error = refusal(data, tmp_path)
    assert text in str(error)
    assert str(tmp_path / "keys.yaml") in str(error)


SECRET = "psk-never-to-be-seen"


@pytest.mark.parametrize(
    "data",
    [
        # Right in itself, beside something wrong.
        {"tenants": {"a": {"keys": [SECRET], "wieght": 1}}},
        {"tenants": {"a": {"keys": [SECRET, SECRET]}}},
        {"tenants": {"a": {"keys": [SECRET]}, "b": {"keys": [SECRET]}}},
        # Wrong as a key.
        {"tenants": {"a": {"keys": ["two words " + SECRET]}}},
        {"tenants": {"a": {"keys": [SECRET * 30]}}},
        {"tenants": {"a": {"keys": ["sha256:" + SECRET]}}},
        {"tenants": {"a": {"keys": [{SECRET: SECRET}]}}},
        # Wrong place.
        {"tenants": {"a": {"keys": SECRET}}},
        {"tenants": {"a": {"keys": {SECRET: 1}}}},
        {"tenants": {"a": {"keys": [[SECRET]]}}},
        {"tenants": {"a": SECRET}},
        {"tenants": {"a": [SECRET]}},
        {"tenants": {"a": {SECRET: 1}}},
        {"tenants": {"a": {"key": SECRET}}},
        {"tenants": {"a": {"keys": [OTHER], "cache_domain": SECRET + "!"}}},
        {"tenants": {"a": {"keys": [OTHER], "weight": SECRET}}},
        {"tenants": {"a": {"keys": [OTHER], "may_share": SECRET}}},
        {"tenants": {SECRET + "=": {"keys": [OTHER]}}},
        {"tenants": SECRET},
        {"tenants": [SECRET]},
        {SECRET: "a"},
        [SECRET],
        SECRET,
        # Not YAML.
        f"tenants: {{a: {{keys: [{SECRET}",
        f"tenants: {{a: {{keys: [*{SECRET}]}}}}",
        f"tenants: {{a: {{keys: [!{SECRET} x]}}}}",
        f"tenants: {{a: {{keys: ['{SECRET}]}}}}",
        f"tenants: {{{SECRET}: 1, {SECRET}: 2}}",
    ],
)
def test_no_error_shows_a_key_wherever_it_was_put(tmp_path, data, caplog):
    caplog.set_level(logging.DEBUG)
    error = refusal(data, tmp_path)
    shown = f"{error} {error!r} {vars(error)} {''.join(traceback.format_exception(error))} {caplog.text}"
    assert SECRET not in shown


def test_file_that_is_no_text_is_refused_without_quoting_it(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_bytes(b"\xff" + SECRET.encode())
    with pytest.raises(ConfigError, match="it is not UTF-8 text") as caught:
        tenants.load(Auth(keys_file=str(file)))
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ConfigError, match="Is a directory"):
        tenants.load(Auth(keys_file=str(tmp_path)))


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"), ("bearer abc", "abc"), ("BEARER  abc ", "abc"),
        ("Basic abc", None), ("abc", None), ("", None), (None, None), ("Bearer", ""),
    ],
)
def test_only_a_bearer_header_holds_a_key(header, key):
    assert bearer(header) == key
