"""The adapters of one engine, loaded and unloaded while it runs. One that cannot be loaded leaves the others as they are.

vLLM keeps an adapter's weights for the modules it knows and silently drops the others. The engine's own processes are asked
what was dropped, and an adapter that lost weights is not served.

Seam: vllm/v1/engine/async_llm.py (`add_lora`); vllm/lora/worker_manager.py, vllm/lora/model_manager.py (`modules`)
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

logger = logging.getLogger(__name__)


class Adapters:
    """Not thread-safe; `serve` is called by one task at a time."""

    def __init__(self, llm: AsyncLLM):
        self._llm = llm
        self._numbers = itertools.count(1)
        self.loaded: dict[str, LoRARequest] = {}
        #: Name -> why it could not be loaded.
        self.problems: dict[str, str] = {}

    async def serve(self, wanted: Mapping[str, str]) -> None:
        """Load and unload adapters so that `wanted` (name -> folder) is served. Requests with an adapter that is unloaded may
        run to their end. Adapters that cannot be loaded are in `problems` afterwards. Raises EngineDeadError."""
        self.problems.clear()
        for name in self.loaded.keys() - wanted.keys():
            del self.loaded[name]  # vLLM drops its weights when another adapter needs the place
        for name, path in wanted.items():
            if name in self.loaded and self.loaded[name].lora_path == path:
                continue
            lora = LoRARequest(name, next(self._numbers), path)
            if problem := await self._load(lora):
                logger.error("adapter %s cannot be served: %s", name, problem)
                self.loaded.pop(name, None)
                self.problems[name] = problem
            else:
                self.loaded[name] = lora

    async def _load(self, lora: LoRARequest) -> str:
        """Load an adapter. Returns "" if it has been loaded, else the reason; nothing of it stays loaded in that case."""
        try:
            await self._llm.add_lora(lora)
            of_ranks = await self._llm.collective_rpc("adapter_weights_without_a_module", args=(lora.lora_int_id,))
            dropped = set(of_ranks[0]).intersection(*of_ranks[1:])  # a pipeline stage has only some of the modules
            if not dropped:
                return ""
            problem = f"the engine's model has no module for {len(dropped)} of its weights, {min(dropped)} among them"
        except EngineDeadError:
            raise
        except Exception as error:
            problem = str(error).removeprefix("Call to add_lora method failed: ") or type(error).__name__
        await self._llm.remove_lora(lora.lora_int_id)
        return problem


class AdapterWeights:
    """Mixed into vLLM's workers (`worker_extension_cls`)."""

    def adapter_weights_without_a_module(self, number: int) -> list[str]:
        """Names of the modules of the loaded adapter `number` that this process's model does not have."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(manager.get_adapter(number).loras.keys() - manager.modules.keys())
