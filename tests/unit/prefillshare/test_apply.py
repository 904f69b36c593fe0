"""What may change of a deployment while it runs, as far as its file says."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from prefillshare import apply as apply_module
from prefillshare import serve_config, which
from prefillshare.app import _replicas
from prefillshare.apply import check_change
from prefillshare.argument_check import Checked
from prefillshare.engines import engine_settings
from prefillshare.kvshare import config
from prefillshare.kvshare.errors import ConfigError, EngineStartError
from prefillshare.kvshare.live_changes import fixed_for_router
from prefillshare.router import tenants


@pytest.fixture
def deploy(model, adapter):
    base = model("base")
    folders = {name: str(adapter(name, base=base)) for name in ("a", "b")}

    def make(cluster=None, **pool):
        pool = {"pool": "agents", "adapters": {"a": folders["a"]}} | pool
        whole = {"base": {"model": str(base), "dtype": "float32", "max_model_len": 64}, "decode": [pool]}
        return config.parse(whole | {"cluster": cluster or {}})

    make.folders = folders
    return make


def test_adapters_come_and_go(deploy):
    check_change(deploy(), deploy(adapters=deploy.folders))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharing": "none"}, r"decode\.0\.sharing: it differs from that of the running pool"),
        ({"adapters": {"a": "b"}}, "adapter 'a' is not the one"),
    ],
)
def test_a_name_keeps_its_meaning(deploy, change, message):
    if "adapters" in change:
        change = {"adapters": {"a": deploy.folders["b"]}}
    with pytest.raises(ConfigError, match=message):
        check_change(deploy(), deploy(**change))


@pytest.mark.parametrize(
    ("cluster", "engines_stay", "routers_stay"),
    [({"kv_lease_s": 90}, False, True), ({"kv_load_timeout_s": 5}, True, False), ({"start_timeout_s": 900}, True, True)],
)
def test_a_lease_replaces_engines_and_a_timeout_routers(deploy, cluster, engines_stay, routers_stay):
    before, after = deploy(), deploy(cluster)
    check_change(before, after)
    assert (engine_settings(before) == engine_settings(after)) is engines_stay
    assert (fixed_for_router(before) == fixed_for_router(after)) is routers_stay


def test_another_name_is_another_deployment(deploy):
    another = deploy().model_copy(update={"name": "ferry"})
    refused = r"name: the running deployment is called prefillshare \(fix: start this one beside it.*or name it prefillshare,"
    with pytest.raises(ConfigError, match=refused):
        check_change(deploy(), another)


@pytest.mark.parametrize("given", ["10.0.0.9:6379", None])
def test_the_command_looks_for_the_files_deployment_and_says_what_it_speaks_to(deploy, monkeypatch, tmp_path, capsys, given):
    old, asked, applied = deploy(), [], []
    file = tmp_path / "d.yaml"
    file.write_text(yaml.safe_dump(old.model_dump(mode="json")))
    monkeypatch.setattr(which, "found", lambda name, address: asked.append((name, address)) or which.Found("10.0.0.1:6379"))
    monkeypatch.setattr(apply_module, "joined", nullcontext)
    monkeypatch.setattr(apply_module, "handle_to_change", lambda: None)
    monkeypatch.setattr(apply_module, "running_deployment", lambda handle, timeout_s: old)
    monkeypatch.setattr(apply_module, "check_arguments", lambda deployment: Checked())
    monkeypatch.setattr(apply_module, "apply", lambda deployment, progress: applied.append(deployment))
    apply_module.apply_command(file, given)
    assert asked == [("prefillshare", given)]
    assert capsys.readouterr().err.startswith(f"prefillshare at 10.0.0.1:6379: base {Path(old.base.model).name}\n")
    assert applied == [old]


def test_a_router_that_does_not_say_what_it_serves_is_an_error(deploy, monkeypatch, tmp_path):
    def hangs(handle, timeout_s):
        assert timeout_s < 8
        raise TimeoutError(f"{timeout_s} s")

    file = tmp_path / "d.yaml"
    file.write_text(yaml.safe_dump(deploy().model_dump(mode="json")))
    monkeypatch.setattr(which, "found", lambda name, address: which.Found("10.0.0.1:6379"))
    monkeypatch.setattr(apply_module, "joined", nullcontext)
    monkeypatch.setattr(apply_module, "handle_to_change", lambda: None)
    monkeypatch.setattr(apply_module, "running_deployment", hangs)
    with pytest.raises(EngineStartError, match="no router says what it serves"):
        apply_module.apply_command(file)


def test_another_cluster_is_another_deployment(deploy):
    with pytest.raises(ConfigError, match=r"cluster\.address: it runs on another cluster"):
        check_change(deploy(), deploy({"address": "10.0.0.1:6379"}))


def test_own_layers_may_change_where_the_prefill_pool_keeps_what_they_need(deploy):
    def own(group):
        return deploy(sharing="droidspeak", own_layers={"a": group})

    check_change(own("0-0"), own("none"))
    with pytest.raises(ConfigError, match=r"keeps the inputs of layers \[\], but the new own_layers need those of \[1\]"):
        check_change(own("0-0"), own("1-1"))


def test_a_decoder_that_runs_keeps_its_own_end_of_the_prompt(deploy):
    """Its engines keep the weights that they have loaded from its folder, whatever is there now."""
    check_change(deploy(own_tokens={"a": 8}), deploy(own_tokens={"a": 8}))
    for before, after in ((8, 1), (1, 8)):
        with pytest.raises(ConfigError, match=rf"'a' computes the last {before} tokens .* trained for {after}") as refused:
            check_change(deploy(own_tokens={"a": before}), deploy(own_tokens={"a": after}))
        assert refused.value.field == "decode.0.own_tokens.a"


def test_a_pool_that_has_followed_its_load_is_not_set_back_to_where_it_began(deploy):
    (pool,) = deploy(replicas=2, autoscale={"max_replicas": 4}).decode
    assert _replicas(pool, as_scaled=False)["autoscaling_config"]["initial_replicas"] == 2
    assert _replicas(pool, as_scaled=True)["autoscaling_config"]["initial_replicas"] is None
    (fixed,) = deploy(replicas=2).decode
    assert _replicas(fixed, as_scaled=True) == {"num_replicas": 2}


class Answer:
    def __init__(self, value):
        self.value = value

    def remote(self, *_):
        return self

    def result(self, timeout_s):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    results = result


class Serve:
    """In the place of Ray Serve: `deployed` is what was put in place, one after the other. `fails`: pools whose engines do not
    start; `routers_fail_with`: pools with which routers do not; `problems`: adapters that engines cannot load."""

    def __init__(self, monkeypatch, old: config.Deployment):
        self.deployed, self.fails, self.problems = [], set(), {}
        self.routers_fail_with: set[str] = set()
        self.left_out: dict[str, str] = {}
        for name, stub in {
            "running_handle": lambda: self,
            "running_deployment": lambda handle: old,
            "build": lambda deployment, routers, scaled, check_files=True: (deployment, routers.deployment),
            "deploy": self.deployed.append,
            "ailing": frozenset,
            "wait_until_running": self._wait,
        }.items():
            monkeypatch.setattr(apply_module, name, stub)
        monkeypatch.setattr(serve_config, "is_from_config", lambda app: False)

    def _wait(self, deployment, progress, ailing):
        engines, routers = self.deployed[-1]
        if self.routers_fail_with & {pool.pool for pool in routers.decode}:
            raise EngineStartError("router did not start")
        if failed := self.fails & {pool.pool for pool in engines.decode}:
            raise EngineStartError(f"{', '.join(failed)} did not start")

    tenants = Answer(tenants.load(None))

    @property
    def adapter_problems(self):
        return Answer(self.problems)

    def broadcast(self, method):
        if method == "left_out":
            return Answer([{}, self.left_out])
        _, routers = self.deployed[-1]
        return Answer([routers.model_dump(mode="json")])


def names(deployed) -> list[tuple[list[str], list[str]]]:
    """What engines had, and what routers served, step by step."""
    return [tuple(sorted(d for pool in part.decode for d in pool.decoders) for part in step) for step in deployed]


def test_engines_change_before_routers_and_drop_what_goes_after_them(deploy, monkeypatch):
    old, new = deploy(), deploy(adapters={"b": deploy.folders["b"]})
    serve = Serve(monkeypatch, old)
    apply_module.apply(new)
    assert names(serve.deployed) == [(["a", "b"], ["a"]), (["a", "b"], ["b"]), (["b"], ["b"])]


def test_an_adapter_that_engines_cannot_load_is_refused_and_engines_go_back(deploy, monkeypatch):
    old, new = deploy(), deploy(adapters=deploy.folders)
    serve = Serve(monkeypatch, old)
    serve.problems = {"b": "vLLM does not yet support DoRA."}
    with pytest.raises(ConfigError) as caught:
        apply_module.apply(new)
    assert caught.value.field == "decode.0.adapters.b"
    assert caught.value.message == f"engines cannot serve {deploy.folders['b']}: vLLM does not yet support DoRA."
    assert names(serve.deployed) == [(["a", "b"], ["a"]), (["a"], ["a"])]


def test_a_decoder_that_a_router_has_left_out_is_refused_before_engines_drop_what_goes(deploy, monkeypatch):
    old, new = deploy(), deploy(adapters={"b": deploy.folders["b"]})
    serve = Serve(monkeypatch, old)
    serve.left_out = {"b": "it is not loaded after 600 s"}
    with pytest.raises(ConfigError, match=r"decode\.0\.adapters\.b: engines cannot serve .*: it is not loaded after 600 s"):
        apply_module.apply(new)
    assert names(serve.deployed) == [(["a", "b"], ["a"]), (["a", "b"], ["b"]), (["a"], ["a"])]


def test_engines_go_back_when_no_router_says_what_they_have_loaded(deploy, monkeypatch):
    old, new = deploy(), deploy(adapters=deploy.folders)
    serve = Serve(monkeypatch, old)
    serve.problems = TimeoutError("after 640 s")
    with pytest.raises(EngineStartError, match="no router says whether engines have loaded the adapters: after 640 s"):
        apply_module.apply(new)
    assert serve.deployed[-1] == (old, old)


def test_engines_go_back_when_new_ones_do_not_start(deploy, monkeypatch):
    old, new = deploy(), deploy(pool="others")
    serve = Serve(monkeypatch, old)
    serve.fails = {"others"}
    with pytest.raises(EngineStartError, match=r"^others did not start"):
        apply_module.apply(new)
    assert serve.deployed[-1] == (old, old)


def test_engines_and_routers_go_back_when_a_new_router_does_not_start(deploy, monkeypatch):
    old, new = deploy(), deploy(pool="others")
    serve = Serve(monkeypatch, old)
    serve.routers_fail_with = {"others"}
    with pytest.raises(EngineStartError, match="router did not start"):
        apply_module.apply(new)
    assert len(serve.deployed) == 3
    assert serve.deployed[-1] == (old, old)


def test_files_of_what_goes_may_be_gone(deploy, monkeypatch):
    old, new = deploy(), deploy(adapters={"b": deploy.folders["b"]})
    shutil.rmtree(deploy.folders["a"])
    settings = engine_settings(old, check_files=False)
    assert settings["agents"][0].contract == engine_settings(new)["agents"][0].contract
    checked = []

    def build(deployment, routers, scaled, check_files=True):
        engine_settings(deployment, check_files)
        checked.extend([deployment] if check_files else [])
        return deployment, routers.deployment

    serve = Serve(monkeypatch, old)
    monkeypatch.setattr(apply_module, "build", build)
    apply_module.apply(new)
    assert checked == [new]
    assert len(serve.deployed) == 3


def test_when_even_going_back_fails_both_reasons_are_given(deploy, monkeypatch):
    old, new = deploy(), deploy(pool="others")
    serve = Serve(monkeypatch, old)
    serve.fails = {"others", "agents"}
    both = r"others.* did not start\nand the previous deployment has not come back: agents did"
    with pytest.raises(EngineStartError, match=both):
        apply_module.apply(new)


def test_more_adapters_than_there_is_room_for_are_refused_before_anything_changes(deploy):
    with pytest.raises(ConfigError, match=r"`max_loras` makes room for 1 adapters, and there are 2; raise max_loras to 2"):
        deploy(adapters=deploy.folders, max_loras=1)
