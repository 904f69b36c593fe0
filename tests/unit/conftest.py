"""Small hand-made model folders, right in every file the lower layers read, with weights of a few bytes; Redis servers."""

import json
import struct
from pathlib import Path

import pytest
from ports import free_port

from benchmarks.redis_server import RedisServer
from kvshare.contract import DecoderContract

#: A Llama of 2 layers, 2 KV heads of 8: one token's KV is 2*2*2*8 = 64 values, 256 bytes in float32.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
WEIGHTS = {"model.embed_tokens.weight": bytes(range(8)), "model.norm.weight": b"normnorm"}


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> Path:
    """One row of bytes per tensor, in the order given."""
    header, start = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [start, start + len(data)]}
        start += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))
    return path


@pytest.fixture(autouse=True)
def _own_fingerprint_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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
def adapter(tmp_path):
    """make(name, base=folder or None for no contract, r=, modules=) -> folder of a LoRA adapter made for that base."""

    def make(name="planner", *, base: Path | None = None, r=8, modules=(), **config) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r} | config))
        names = [f"base_model.model.model.layers.0.self_attn.{module}.lora_A.weight" for module in modules] or ["lora_A"]
        write_safetensors(folder / "adapter_model.safetensors", dict.fromkeys(names, b"12345678"))
        if base:
            DecoderContract.of_base(base, trained_with="by hand").write(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """One for all tests, each of which uses a prefix of its own."""
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
