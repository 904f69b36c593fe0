"""A worker in which vLLM no longer asks for the adapters of rows where the hook stands (test_base_in_place.py)."""

from prefillshare.kvshare_vllm.engine.worker import SharedKVWorker


class Worker(SharedKVWorker):
    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        del self.model_runner.set_active_loras  # the hook; the class's own is asked again
