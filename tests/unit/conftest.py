"""Fixtures: small hand-made model folders, correct in every file that the lower layers read, with weights of a few bytes; Redis
servers."""

import json
import sys
from pathlib import Path

import pytest
from demo_model import smollm  # noqa: F401 - a fixture
from model_folders import CONFIG, LINEAR, WEIGHTS, lora, write_safetensors
from paused_imports import pytest_collection_finish, pytest_sessionstart  # noqa: F401 - hooks
from ports import free_port

from benchmarks.shared.redis_server import RedisServer
from prefillshare.kvshare.contract import DecoderContract


@pytest.fixture(autouse=True)
def _own_fingerprint_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices here are tiny. With a thread per core, each of a model's hundreds of steps ends with threads that spin until the
    last one is done: no gain on idle cores, and minutes instead of seconds if other work occupies a core."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def safetensors():
    return write_safetensors


@pytest.fixture
def model(tmp_path):
    """make(name, config changes, tensors=, words=, template=) -> folder of a model."""

    def make(name="base", *, tensors=None, words=("a", "b"), template="{{ messages }}", **config) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {k: v for k, v in (CONFIG | config).items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(settings))
        vocabulary = {word: number for number, word in enumerate(words)}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": vocabulary}}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        (folder / "chat_template.jinja").write_text(template)
        write_safetensors(folder / "model.safetensors", tensors or WEIGHTS)
        return folder

    return make


@pytest.fixture
def plain(tmp_path):
    """The smallest deployment that is right; its folders exist."""
    for name in ("base", "planner", "coder"):
        (tmp_path / name).mkdir()
    return {
        "base": {"model": str(tmp_path / "base")},
        "decode": [{"pool": "agents", "adapters": {"planner": str(tmp_path / "planner")}}],
    }


@pytest.fixture
def adapter(tmp_path):
    """make(name, base=folder or None for no contract, r=, modules=, tensors=, config changes) -> folder of a LoRA adapter made
    for that base. A config change to `...` leaves the setting out."""

    def make(name="planner", *, base: Path | None = None, r=8, modules=("q_proj",), tensors=None, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {"peft_type": "LORA", "r": r, "lora_alpha": 16, "target_modules": list(modules), "bias": "none"} | config
        (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))
        if tensors is None:
            whole = [module for module in LINEAR if module.rsplit(".", 1)[1] in modules]
            tensors = lora(whole, r if isinstance(r, int) and r else 8)
        write_safetensors(folder / "adapter_model.safetensors", tensors)
        if base:
            DecoderContract.of_base(base, trained_with="by hand").write(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """One server for all tests, each of which uses its own prefix."""
    server = RedisServer(tmp_path_factory.mktemp("redis"), free_port())
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def own_redis_server(tmp_path):
    """make(password=) -> a server that the test may stop."""
    servers = []

    def make(password: str = "") -> RedisServer:
        folder = tmp_path / f"redis-{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder, free_port(), password))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.kill()
