"""The deployment file: what it refuses, in which words, and what it fills in."""

import re

import pytest
from changed_deployment import put, refusal
from pydantic import ValidationError

from prefillshare.kvshare import config, modes
from prefillshare.kvshare.engine_settings import OUR_ENGINE_ARGS
from prefillshare.kvshare.errors import ConfigError

ONE_KIND = "give either `adapters` (LoRA on the base) or `model` (full weights), and not both"


def test_smallest_deployment_gets_the_documented_defaults(plain):
    deployment = config.parse(plain)
    assert deployment.base.name == "base"
    assert (deployment.base.dtype, deployment.base.max_model_len, deployment.base.block_size) == ("bfloat16", 4096, 32)
    assert (deployment.prefill, deployment.shared_prefill) == (None, None)  # the adapter pool makes base KV itself
    pool = deployment.decode[0]
    assert (pool.sharing, pool.max_lora_rank, pool.max_loras) == ("prefillshare", 16, 8)
    assert (pool.serve_base, pool.engine_args) == (True, {})
    router = deployment.router
    assert (router.host, router.http_port, router.grpc_port) == ("127.0.0.1", 8000, 9000)
    assert (router.max_queued, router.max_sessions, router.session_ttl_s, router.default_deadline_s) == (256, 10_000, 3600, 300)
    assert (router.replicas, router.redis_url, router.redis_password_env) == (1, None, None)
    assert deployment.cluster.address is None
    assert deployment.cluster.kv_lease_s == 60


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        # Unknown keys, at every depth.
        ("routr", {}, "routr: unknown key; did you mean 'router'?"),
        ("base/dtipe", "float32", "base.dtipe: unknown key; did you mean 'dtype'?"),
        ("prefill/replica", 1, "prefill.replica: unknown key; did you mean 'replicas'?"),
        ("decode/0/adapter", {}, "decode.0.adapter: unknown key; did you mean 'adapters'?"),
        ("router/htp_port", 1, "router.htp_port: unknown key; did you mean 'http_port'?"),
        ("cluster/adress", "auto", "cluster.adress: unknown key; did you mean 'address'?"),
        (
            "cluster/zzz",
            1,
            "cluster.zzz: unknown key; known keys: address, num_cpus, start_timeout_s, kv_transport, kv_lease_s",
        ),
        # Wrong types.
        ("base", 3, "base: should be a mapping, got 3"),
        ("decode", {"pool": "a"}, "decode: should be a list, got a mapping"),
        ("decode", [], "decode: should have at least one entry, got []"),
        ("base/model", ["a"], "base.model: Input should be a valid string, got a list"),
        ("base/model", "", "base.model: should not be empty, got ''"),
        ("decode/0/adapters/planner", "", "decode.0.adapters.planner: should not be empty, got ''"),
        ("base/dtype", "fp32", "base.dtype: Input should be 'float32', 'bfloat16' or 'float16', got 'fp32'"),
        ("prefill/replicas", 1.5, "prefill.replicas: Input should be a valid integer, got a number with a fractional part"),
        # Out of range.
        ("base/max_model_len", 15, "base.max_model_len: Input should be greater than or equal to 16, got 15"),
        ("base/block_size", 0, "base.block_size: Input should be greater than or equal to 1, got 0"),
        ("prefill/replicas", -1, "prefill.replicas: Input should be greater than or equal to 0, got -1"),
        ("prefill/kv_cache_gib", 0, "prefill.kv_cache_gib: Input should be greater than 0, got 0"),
        ("prefill/kv_cache_gib", float("inf"), "prefill.kv_cache_gib: Input should be a finite number, got inf"),
        ("prefill/cpu_cores", "0-", "got '0-'"),
        ("decode/0/max_lora_rank", 20, "decode.0.max_lora_rank: Input should be 8, 16, 32, 64, 128 or 256, got 20"),
        ("router/http_port", 0, "router.http_port: Input should be greater than or equal to 1, got 0"),
        ("router/http_port", 65536, "router.http_port: Input should be less than or equal to 65535, got 65536"),
        ("router/grpc_port", 70000, "router.grpc_port: Input should be less than or equal to 65535, got 70000"),
        ("cluster/kv_lease_s", 5, "cluster.kv_lease_s: Input should be greater than or equal to 6, got 5"),
        # Names.
        ("base/name", "a b", "base.name: String should match pattern"),
        ("decode/0/pool", "", "decode.0.pool: String should match pattern"),
        ("decode/0/adapters/a b", "x", "decode.0.adapters.a b: String should match pattern"),
        # Rules of our own.
        (
            "decode/0/max_loras",
            0,
            "decode.0.max_loras: Input should be greater than or equal to 1, got 0",
        ),
        (
            "decode/0/adapters",
            {f"a{n}": "x" for n in range(9)},
            "decode.0: `max_loras` makes room for 8 adapters, and there are 9; raise max_loras to 9",
        ),
        (
            "decode/0/sharing",
            "share",
            "decode.0.sharing: unknown sharing mode 'share'; allowed: prefillshare, icarus, droidspeak, none",
        ),
        ("decode/0/model", "x", f"decode.0: {ONE_KIND}"),
        ("decode/0/adapters", {}, f"decode.0: {ONE_KIND}"),
        ("decode/0/name", "n", "decode.0: `name` (n) goes with `model`; adapters are named by their keys, so remove it"),
        ("decode/0/own_layers", {"planner": "4-9"}, "mode prefillshare computes no layers of a prompt again; remove it"),
        ("decode/0/quality_floor", 0.1, "`quality_floor`: mode prefillshare computes no layers of a prompt again"),
        ("decode/0/own_tokens", {"coder": 8}, "`own_tokens` names coder; this pool's decoders are planner"),
        ("decode/0/own_tokens", {"planner": 0}, "decode.0.own_tokens.planner: Input should be greater than or equal to 1"),
        ("decode/0/prefill", {}, "engines of their own; prefillshare uses the shared pool, so remove it"),
        (
            "prefill",
            {"gpu_share": 0.5, "tensor_parallel_size": 2},
            "prefill: gpu_share 0.5 needs tensor_parallel_size 1, got 2",
        ),
        ("router/grpc_port", 8000, "router: http_port and grpc_port are both 8000; give each a port of its own"),
        ("router/replicas", 2, "router: 2 router replicas need a session store they share; set redis_url or use 1"),
        ("router/redis_password_env", "A_B", "router: redis_password_env goes with redis_url; set that too, or remove it"),
        ("router/redis_password_env", "a-b", "router.redis_password_env: String should match pattern"),
        ("router/redis_prefix", "a:{b}", "router.redis_prefix: String should match pattern"),
    ],
)
def test_refusal_names_the_field_the_value_and_what_is_allowed(plain, path, value, text):
    assert text in str(refusal(put(plain, path, value)))


@pytest.mark.parametrize(
    "url",
    [
        "redis://redis.example:6380/3",
        "rediss://someone@[::1]?ssl_ca_certs=/ca.pem",
        "unix:///run/redis.sock",
    ],
)
def test_several_routers_share_sessions_in_redis(plain, url):
    router = config.parse(put(plain, "router", {"redis_url": url, "replicas": 3})).router
    assert (router.redis_url, router.redis_password(), router.redis_prefix) == (url, None, "prefillshare")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://u:secret@h",
        "secret@h:6379",
        "redis://:secret@",
        "redis://:secret@h",
        "rediss://someone:secret@h:6380/1?ssl_ca_certs=/ca.pem",
        "redis://h?ssl_password=secret",
        "redis://:sec/secret@h",
        "redis://u:1/secret@h",
        "redis://u:1#secret@h",
        "redis://u:1?secret@h",
        "redis://:secret@h:x",
        "redis://:secret@h:0",
        "redis://:secret@h/db",
        "redis://h?password=secret",
        "redis://h?secret=1",
        "unix://?secret",
    ],
)
def test_what_is_no_redis_url_is_refused_and_not_repeated(plain, url):
    error = refusal(put(plain, "router/redis_url", url))
    assert error.field == "router.redis_url"
    assert "redis_password_env" in error.message or "must begin with ssl_" in error.message
    assert "secret" not in str(error)


@pytest.mark.parametrize("where", ["prefill", "decode/0"])
def test_engine_args_that_are_ours_are_refused(plain, where):
    for name in OUR_ENGINE_ARGS:
        error = refusal(put(plain, f"{where}/engine_args", {name: 1, "swap_space": 2}))
        assert error.field == f"{where}.engine_args".replace("/", ".")
        assert error.message == f"prefillshare sets {name} itself; remove it here and use the deployment's own fields"


def test_other_engine_args_are_kept(plain):
    assert config.parse(put(plain, "prefill/engine_args", {"swap_space": 2})).prefill.engine_args == {"swap_space": 2}


def test_unknown_key_of_a_pools_own_prefill_gets_a_hint_of_that_level(plain):
    put(plain, "decode/0/sharing", "none")
    error = refusal(put(plain, "decode/0/prefill", {"kv_cache": 1}))
    assert str(error) == "decode.0.prefill.kv_cache: unknown key; did you mean 'kv_cache_gib'?"


def test_every_bad_field_is_reported_at_once(plain):
    error = refusal({"base": {"model": "x", "block_size": 0}, "decode": [{"pool": "a b", "adapters": {"p": "x"}}], "x": 1})
    lines = str(error).splitlines()
    assert [line.strip().split(":")[0] for line in lines] == ["base.block_size", "decode.0.pool", "x"]
    assert error.field == "base.block_size"


@pytest.mark.parametrize("missing", ["base", "decode", "base/model", "decode/0/pool"])
def test_missing_required_key_is_named(plain, missing):
    *parents, last = [int(part) if part.isdigit() else part for part in missing.split("/")]
    node = plain
    for part in parents:
        node = node[part]
    del node[last]
    assert str(refusal(plain)) == f"{missing.replace('/', '.')}: required, but not given"


def test_pool_name_used_twice_is_refused(plain, tmp_path):
    plain["decode"].append({"pool": "agents", "adapters": {"coder": str(tmp_path / "coder")}})
    assert str(refusal(plain)) == "decode: pool name used twice: agents; give each pool a name of its own"


@pytest.mark.parametrize("name", ["router", "prefill", "prefill-agents"])
def test_pool_named_like_another_part_of_the_system_is_refused(plain, tmp_path, name):
    plain["decode"].append({"pool": name, "adapters": {"coder": str(tmp_path / "coder")}})
    assert str(refusal(plain)) == f"decode: pool name {name} is taken by another part of the system; rename the pool"


def test_decoder_name_used_twice_is_refused_across_kinds_of_pool(plain, tmp_path):
    plain["decode"].append({"pool": "planner", "model": str(tmp_path / "coder")})
    assert str(refusal(plain)) == "decode: decoder name used twice: planner; a name is served by one pool"


@pytest.mark.parametrize("serve_base", [True, False])
def test_decoder_named_like_the_base_is_refused(plain, tmp_path, serve_base):
    plain["decode"][0] |= {"adapters": {"base": str(tmp_path / "planner")}, "serve_base": serve_base}
    assert str(refusal(plain)) == "decode: decoder 'base' is named like the base; rename it or set base.name"


def test_mode_without_full_weights_refuses_a_model(plain, tmp_path, monkeypatch):
    class AdaptersOnly(type(modes.get_mode("prefillshare"))):
        name, full_weights = "adapters_only", False

    monkeypatch.setitem(modes._MODES, "adapters_only", AdaptersOnly())
    plain["decode"] = [{"pool": "coder", "model": str(tmp_path / "coder"), "sharing": "adapters_only"}]
    assert str(refusal(plain)).startswith("decode.0: sharing mode adapters_only serves adapters only; ")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("base/model", "a model in Hugging Face format"),
        ("decode/0/adapters/planner", "a LoRA adapter in PEFT format"),
        ("decode/1/model", "a model in Hugging Face format"),
    ],
)
def test_missing_folder_is_refused_with_the_places_looked_in(plain, tmp_path, path, kind):
    plain["decode"].append({"pool": "coder", "model": str(tmp_path / "coder")})
    with pytest.raises(ConfigError) as caught:
        config.parse(put(plain, path, "nowhere"), tmp_path)
    error = caught.value
    assert error.field == path.replace("/", ".")
    assert re.match(rf"no such folder: 'nowhere' \(looked for \S+ or {tmp_path}/nowhere\)$", error.message)
    assert error.fix == f"give the folder of {kind}"


def test_relative_folders_are_tried_from_the_current_folder_then_from_the_files(plain, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "both", there / "both", there / "only"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    put(plain, "base/model", "both")
    put(plain, "decode/0/adapters/planner", "only")
    deployment = config.parse(plain, there)
    assert deployment.base.model == str(here / "both")
    assert deployment.decode[0].adapters == {"planner": str(there / "only")}


@pytest.mark.parametrize("name", ["", "../demo", "two words", "a" * 64, ".hidden"])
def test_a_name_that_could_not_be_a_file_or_a_label_is_refused(plain, name):
    assert refusal(put(plain, "name", name)).field == "name"


def test_a_deployment_has_a_name_if_none_is_given(plain):
    assert config.parse(plain).name == "prefillshare"
    assert config.parse(put(plain, "name", "ferry-2.b_c")).name == "ferry-2.b_c"


def test_missing_file_is_refused_by_path(tmp_path):
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path / "none.yaml")
    assert str(caught.value) == (
        f"no such deployment file: {tmp_path}/none.yaml (fix: deploy/configs/ holds one example per scenario)"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"base: [", "is not YAML"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"", f"a deployment is a mapping with the keys {', '.join(config.Deployment.model_fields)}, got nothing"),
        (b"- 1", "tracing, got a list"),
        (b"base: {model: a, model: b}", "key 'model' is given twice"),
    ],
)
def test_file_that_is_no_deployment_is_refused(tmp_path, content, text):
    file = tmp_path / "deployment.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(text)):
        config.load(file)


def test_unreadable_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}"):
        config.load(tmp_path)


def test_unquoted_core_number_is_a_core(tmp_path, plain):
    assert config.parse(put(plain, "prefill/cpu_cores", 0)).prefill.cpu_cores == "0"
    assert "valid string, got True" in str(refusal(put(plain, "prefill/cpu_cores", True)))


def test_tree_is_frozen(plain):
    deployment = config.parse(plain)
    pool, router = deployment.decode[0], deployment.router
    for node, name in ((deployment, "base"), (deployment.base, "dtype"), (pool, "pool"), (router, "host")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(node, name, None)


def test_own_prefill_defaults_to_one_engine_of_the_pools_sizes(plain):
    plain["decode"][0] |= {"sharing": "none", "replicas": 3, "kv_cache_gib": 2.5, "max_num_seqs": 7}
    deployment = config.parse(plain)
    own = deployment.decode[0].own_prefill()
    assert (own.replicas, own.kv_cache_gib, own.max_num_seqs) == (1, 2.5, 7)
    assert deployment.shared_prefill is None


def test_own_prefill_can_be_given(plain):
    plain["decode"][0] |= {"sharing": "none", "prefill": {"replicas": 2, "kv_cache_gib": 4}}
    own = config.parse(plain).decode[0].own_prefill()
    assert (own.replicas, own.kv_cache_gib) == (2, 4)


def test_replicas_that_follow_the_load_begin_within_their_bounds(plain):
    pool = put(plain, "decode/0/autoscale", {"max_replicas": 4})
    assert config.parse(pool).decode[0].most_replicas == 4
    put(plain, "decode/0/replicas", 5)
    assert "replicas 5 is not within autoscale's 1 to 4" in str(refusal(plain))


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector:4317", "http://", "http:// collector"])
def test_what_is_no_collector_is_refused(plain, endpoint):
    assert "tracing.otlp_endpoint: String should match pattern" in str(refusal(put(plain, "tracing/otlp_endpoint", endpoint)))


def test_clients_may_only_shorten_their_sessions_unless_they_are_given_more():
    assert config.Router(session_ttl_s=60).longest_session_ttl_s == 60
    assert config.Router(session_ttl_s=60, max_session_ttl_s=600).longest_session_ttl_s == 600
    with pytest.raises(ValueError, match="max_session_ttl_s is 30, but sessions live for 60"):
        config.Router(session_ttl_s=60, max_session_ttl_s=30)
