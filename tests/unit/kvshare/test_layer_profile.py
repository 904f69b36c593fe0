"""The search finds the layers that matter, without measuring all groups; its file is for these weights only."""

import json
from itertools import combinations

import pytest
from rich.console import Console
from tiny_in_memory import model as tiny

from prefillshare import reference
from prefillshare.finetuning import layer_profile_report
from prefillshare.finetuning.layer_profile import Measured, Profiler, Seen
from prefillshare.finetuning.transcripts import Example
from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.errors import ConfigError, ContractMismatch
from prefillshare.kvshare.layer_group import LayerGroup
from prefillshare.kvshare.layer_profile import FILE, LayerProfile, Point

EXAMPLES = [Example(tuple((7 * i + n) % 90 for i in range(20 + n)), ((12, 18 + n),)) for n in range(6)]
QUIET = Console(quiet=True)


@pytest.fixture
def profiler(tmp_path):
    def make(base, decoder, examples=EXAMPLES):
        return Profiler(base, decoder, examples, Measured(tmp_path / "measured", "run"), QUIET)

    return make


def test_layers_that_differ_are_found(profiler):
    """The decoder has another layer 1, and that alone."""
    base, decoder = tiny("llama", 1), tiny("llama", 1)
    other = tiny("llama", 3)
    decoder.model.layers[1].load_state_dict(other.model.layers[1].state_dict())
    made = profiler(base, decoder)
    points = {point.layers: point for point in made.search()}
    # Layer 1 makes other KV there, and other hidden states for layer 2.
    assert points["1-2"].divergence == pytest.approx(0, abs=1e-6)
    assert points["1-2"].agreement == 1
    assert points["none"].divergence > points["1-1"].divergence > 0.001
    sensitivity = made.sensitivity()
    assert sensitivity[0] == pytest.approx(0, abs=1e-6)
    assert min(sensitivity[1:]) > 0.001


def test_what_is_compared_is_what_the_reference_says(profiler, monkeypatch):
    base, decoder, example = tiny("qwen3", 1), tiny("qwen3", 2), EXAMPLES[0]
    seen, stock = [], Profiler._log_probabilities
    monkeypatch.setattr(Profiler, "_log_probabilities", lambda *a: seen.append(stock(*a)) or seen[-1])
    wanted = {"none": None, "1-2": LayerGroup(1, 2), "0-1": LayerGroup(0, 1)}
    compared = profiler(base, decoder, [example])._compare(example, wanted)
    (start, end), ids = example.responses[-1], list(example.token_ids)
    expected = [reference.none(base, decoder, ids[:start], ids[start:end])]
    expected += [reference.droidspeak(base, decoder, ids[:start], ids[start:end], group) for group in ("", "1-2", "0-1")]
    own, *others = seen
    for got, want in zip(seen, expected, strict=True):
        assert got[range(end - start), ids[start:end]].tolist() == pytest.approx(want, abs=1e-4)
    for name, other in zip(wanted, others, strict=True):
        assert compared[name].divergence == pytest.approx((own.exp() * (own - other)).sum(-1).mean().item(), abs=1e-6)


def landscape(group: LayerGroup | str | None, critical=range(11, 15)) -> float:
    """Divergence where some layers matter much and all others a little."""
    if isinstance(group, str):
        return 1.0 if int(group.split()[1]) in critical else 0.01
    recomputed = set(range(group.first, group.last + 1)) if group else set()
    return sum(1.0 if layer in critical else 0.01 for layer in range(30) if layer not in recomputed)


def test_the_best_groups_are_found_by_measuring_few(profiler, monkeypatch):
    calls = []

    def compare(self, example, wanted):
        calls.extend(wanted)
        return {name: Seen(landscape(what), 0.5) for name, what in wanted.items()}

    monkeypatch.setattr(Profiler, "_compare", compare)
    made = profiler(tiny("llama", 1), tiny("llama", 2), EXAMPLES * 8)
    made.layers = 30
    profile = LayerProfile("b", "d", "f", 30, tuple(made.search()), tuple(made.sensitivity()))
    best = {len(LayerGroup(a, b)): landscape(LayerGroup(a, b)) for a, b in combinations(range(30), 2)}
    by_size = {point.size: point.divergence for point in profile.frontier}
    assert by_size[4] == pytest.approx(landscape(LayerGroup(11, 14)))
    for size, divergence in by_size.items():
        if size >= 4:
            assert divergence <= min(d for s, d in best.items() if s <= size) + 0.05
    everything = (30 * 31 // 2) * len(EXAMPLES * 8)
    assert len(calls) < everything / 3
    assert sorted(range(30), key=lambda layer: -profile.sensitivity[layer])[:4] == [11, 12, 13, 14]


def test_a_profile_that_was_ended_goes_on(profiler, monkeypatch):
    compared, stock = [], Profiler._compare

    def counted(self, example, wanted):
        if len(compared) == 5:
            raise KeyboardInterrupt
        compared.append(example)
        return stock(self, example, wanted)

    monkeypatch.setattr(Profiler, "_compare", counted)
    base, decoder = tiny("llama", 1), tiny("llama", 2)
    with pytest.raises(KeyboardInterrupt):
        profiler(base, decoder).search()
    monkeypatch.setattr(Profiler, "_compare", lambda *a: compared.append(a) or stock(*a))
    ended = profiler(base, decoder).search()
    again = len(compared)
    assert profiler(base, decoder).search() == ended
    assert len(compared) == again


def test_measurements_of_another_run_are_left(tmp_path):
    Measured(tmp_path / "m", "one").add(0, {"none": Seen(1.0, 0.5)})
    assert Measured(tmp_path / "m", "one").get(0, "none") == Seen(1.0, 0.5)
    with (tmp_path / "m").open("a") as file:
        file.write("[0, \"1-")  # it was ended while it wrote
    assert Measured(tmp_path / "m", "one").get(0, "none") == Seen(1.0, 0.5)
    assert Measured(tmp_path / "m", "two").get(0, "none") is None


def point(layers: str, divergence: float) -> Point:
    return Point(layers, divergence, divergence, divergence, 0.9, 8)


PROFILE = LayerProfile(
    "base", "decoder", "data", 12,
    (point("none", 0.9), point("5-5", 0.5), point("4-5", 0.3), point("2-3", 0.6), point("4-7", 0.1), point("4-9", 0.05),
     point("1-7", 0.02), point("4-10", 0.06), point("4-11", 0.01)),
    (0.1,) * 12,
)  # fmt: skip


def test_the_frontier_has_what_no_smaller_group_betters():
    assert [p.layers for p in PROFILE.frontier] == ["none", "5-5", "4-5", "4-7", "4-9", "1-7", "4-11"]


def test_groups_within_a_floor_begin_at_one_layer():
    assert PROFILE.within(0.35) == ("4-11", "4-9", "4-7", "4-5")
    assert PROFILE.within(0.07) == ("4-11", "4-9")
    assert PROFILE.within(1.0) == ("none",)
    assert PROFILE.within(0.001) == ()


def test_a_profile_is_read_back_and_belongs_to_its_weights(tmp_path, model, adapter):
    base = model("base")
    decoder = adapter("a", base=base)
    profile = LayerProfile(fingerprint.weights(base), fingerprint.weights(decoder), "data", 12, PROFILE.points, (0.1,) * 12)
    profile.write(decoder)
    assert LayerProfile.read(decoder, base) == profile
    LayerProfile("other", profile.decoder, "data", 12, PROFILE.points, ()).write(decoder)
    with pytest.raises(ContractMismatch, match="measured with base other"):
        LayerProfile.read(decoder, base)
    (decoder / FILE).write_text(json.dumps({"version": 1, "points": [{"layers": "9-4"}]}))
    with pytest.raises(ConfigError, match="not a layer profile"):
        LayerProfile.read(decoder, base)
    (decoder / FILE).unlink()
    with pytest.raises(ConfigError, match="prefillshare profile"):
        LayerProfile.read(decoder, base)


def test_a_profile_is_drawn_and_listed(tmp_path):
    assert layer_profile_report.plot(PROFILE, tmp_path).stat().st_size > 1000
    assert layer_profile_report.table(PROFILE).row_count == len(PROFILE.frontier)
