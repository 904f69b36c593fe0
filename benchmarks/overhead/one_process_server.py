"""vLLM's OpenAI server with scheduler and model in one process, as our engines run on CPUs.

This is not what vLLM ships. It separates the cost of our path from the effect of the process layout.
"""

from __future__ import annotations

from types import SimpleNamespace

from prefillshare.kvshare_vllm.engine.launch import one_process


def main() -> None:
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.v1.engine.async_llm import AsyncLLM

    start = AsyncLLM.from_vllm_config

    def from_vllm_config(vllm_config, **kwargs):
        with one_process(vllm_config, SimpleNamespace(tensor_parallel_size=1)):
            return start(vllm_config=vllm_config, **kwargs)

    AsyncLLM.from_vllm_config = from_vllm_config
    entry.main()


if __name__ == "__main__":
    main()
