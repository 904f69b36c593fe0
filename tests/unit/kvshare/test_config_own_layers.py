"""Which layers of a prompt a decoder computes itself, as the deployment file or a profile beside the decoder says."""

import pytest
from changed_deployment import put, refusal

from prefillshare.kvshare import config
from prefillshare.kvshare.layer_profile import LayerProfile, Point


@pytest.fixture
def droidspeak(plain):
    return put(plain, "decode/0/sharing", "droidspeak")


@pytest.mark.parametrize(
    ("own_layers", "text"),
    [
        ({"planner": "9-4"}, "layers 9-4 are no group"),
        ({"planner": "all"}, "'all' is no group of layers; write the first and the last, like 4-9"),
        ({"planner": ["4-7", "4-9"]}, "planner: give at least one group of layers, the one of most layers first"),
        ({"planner": []}, "planner: give at least one group of layers"),
        ({"coder": "4-9"}, "`own_layers` names coder; this pool's decoders are planner"),
    ],
)
def test_what_is_no_group_of_layers_is_refused(droidspeak, own_layers, text):
    assert text in str(refusal(put(droidspeak, "decode/0/own_layers", own_layers)))


def test_one_group_may_be_written_without_a_list(droidspeak):
    deployment = config.parse(put(droidspeak, "decode/0/own_layers", {"planner": "4-9"}))
    assert deployment.decode[0].own_layers == {"planner": ("4-9",)}


def test_groups_come_from_the_profile_by_the_quality_floor(droidspeak, monkeypatch):
    points = tuple(Point(layers, kl, kl, kl, 0.9, 8) for layers, kl in (("none", 0.9), ("2-3", 0.2), ("2-5", 0.1)))
    profile = LayerProfile("b", "d", "data", 8, points, ())
    monkeypatch.setattr(LayerProfile, "read", lambda decoder, base: profile)
    put(droidspeak, "decode/0/quality_floor", 0.25)
    assert config.parse(droidspeak).decode[0].own_layers == {"planner": ("2-5", "2-3")}
    put(droidspeak, "decode/0/own_layers", {"planner": "1-1"})
    assert config.parse(droidspeak).decode[0].own_layers == {"planner": ("1-1",)}
    del droidspeak["decode"][0]["own_layers"]
    error = refusal(put(droidspeak, "decode/0/quality_floor", 0.01))
    assert (error.field, "within 0.01; the best measured has 0.1" in error.message) == ("decode.0.quality_floor", True)


def test_a_floor_without_a_profile_says_how_to_measure_one(droidspeak):
    error = refusal(put(droidspeak, "decode/0/quality_floor", 0.25))
    assert error.field == "decode.0.quality_floor"
    assert "prefillshare profile" in error.fix
