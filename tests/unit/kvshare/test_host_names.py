"""Which hosts a page may be asked for under: names as browsers send them."""

import pytest

from prefillshare.kvshare.config import Router
from prefillshare.kvshare.host_names import cannot_be_rebound, named, problem


@pytest.mark.parametrize(
    ("header", "host"),
    [
        ("agents.example", "agents.example"),
        ("Agents.Example:8000", "agents.example"),
        ("agents.example.", "agents.example"),
        ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[2001:DB8::7]", "2001:db8::7"),
        ("", ""),
        ("::1", ""),
        ("evil.example:80:80", "evil.example:80"),
        ("[evil.example]", "[evil.example]"),
    ],
)
def test_the_host_of_a_header_is_its_name_without_the_port(header, host):
    if header != "::1":
        assert named(header) == host
    else:  # no browser sends it so; what is left of it is no address
        assert not cannot_be_rebound(named(header))


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "10.1.2.3", "::1", "2001:db8::7"])
def test_addresses_and_this_machines_own_names_cannot_be_rebound(host):
    assert cannot_be_rebound(host)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", ""])
def test_names_that_somebody_else_may_own_can(host):
    assert not cannot_be_rebound(host)


def test_names_are_taken_as_browsers_send_them():
    for names in (("*",), ("agents.example",), ("agents", "a-1.b-2.example"), ()):
        assert problem(names) == ""
        assert Router(ui_hosts=names).ui_hosts == names


@pytest.mark.parametrize(
    "name", ["Agents.example", "agents.example:8000", "https://agents.example", "-a.example", "a..b", "a_b.example", "", "a b"]
)
def test_what_no_browser_sends_as_a_host_is_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match=r'is no host name; allowed: "\*", or a name like "agents\.example\.org"'):
        Router(ui_hosts=[name])


def test_every_host_beside_others_is_refused():
    with pytest.raises(ValueError, match="allows every host"):
        Router(ui_hosts=["*", "agents.example"])


def test_a_bare_off_in_yaml_switches_the_page_off():
    assert Router(ui=False).ui == Router(ui="off").ui == "off"
    assert Router().ui == "read"
    for value in (True, "on", None):
        with pytest.raises(ValueError, match="'off', 'read' or 'full'"):
            Router(ui=value)
