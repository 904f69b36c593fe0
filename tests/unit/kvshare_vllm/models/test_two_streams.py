"""What the two-stream model is told of a step: which rows have a second stream, and whether the streams attend by themselves.

GPUs capture steps of decodes as graphs, CPUs do not. Here both are told as the model runner would tell them.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode

from prefillshare.kvshare_vllm.models import two_streams
from prefillshare.kvshare_vllm.models.two_streams import Apart

GRAPHS, NO_GRAPHS = CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.NONE


class Group:
    """An attention group that says what it was asked to build."""

    def __init__(self, name: str):
        self.name = name

    def build_metadata(self, metadata):
        return self.name, metadata.num_actual_tokens


class Runner:
    """In place of a model runner. `kernels`: the adapters of the rows that the adapters' kernels were told of."""

    def __init__(self, graphs: CUDAGraphMode):
        self.vllm_config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=graphs))
        self.device, self.model = torch.device("cpu"), SimpleNamespace(every_row=False, with_adapter=None, apart=None)
        self.attn_groups = [[Group("both")]]

    def get_model(self):
        return self.model

    def _set_active_loras(self, of_requests, of_tokens, adapters):
        self.kernels = of_tokens

    def _build_attention_metadata(self, metadata):
        return self.attn_groups[0][0].build_metadata(metadata)

    def step(self, *requests: tuple[int, int]) -> None:
        """`requests`: (adapter, scheduled tokens) of each."""
        lengths = [tokens for _, tokens in requests]
        starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        self._set_active_loras(
            tuple(adapter for adapter, _ in requests), tuple(a for a, tokens in requests for _ in range(tokens)), set()
        )
        self._build_attention_metadata(
            SimpleNamespace(num_actual_tokens=sum(lengths), max_query_len=max(lengths), query_start_loc_cpu=starts)
        )


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(two_streams, "_can_be_apart", lambda model: True)
    monkeypatch.setattr(two_streams, "_one_stream_group", lambda runner, model: Group("one"))
    monkeypatch.setattr(two_streams, "of_rows", lambda metadata, parts: (None, SimpleNamespace(num_actual_tokens=len(parts))))

    def make(graphs: CUDAGraphMode) -> Runner:
        made = Runner(graphs)
        two_streams.follow_adapters(made)
        return made

    return make


@pytest.mark.parametrize("graphs", [GRAPHS, NO_GRAPHS])
def test_in_a_step_with_prompt_rows_each_stream_attends_by_itself(runner, graphs):
    running = runner(graphs)
    running.step((1, 5), (0, 3), (2, 1))
    assert running.model.apart == Apart(encoder=("one", 9), decoder=("one", 2))
    assert (running.model.with_adapter.tolist(), running.kernels) == ([0, 2], (1, 2))
    running.step((0, 5), (0, 1))
    assert running.model.apart == Apart(encoder=("one", 6), decoder=None)
    assert (running.model.with_adapter, running.kernels) == (None, (0,))


def test_where_every_row_has_both_streams_keys_and_values_are_read_once(runner):
    running = runner(NO_GRAPHS)
    running.step((1, 1), (2, 1))
    assert running.model.apart is None
    assert running.model.with_adapter.tolist() == [0, 1]


@pytest.mark.parametrize("requests", [((1, 1), (2, 1)), ((1, 1), (0, 1))])
def test_a_graph_of_decodes_with_adapters_has_both_streams_in_every_row(runner, requests):
    running = runner(GRAPHS)
    running.step(*requests)
    assert running.model.every_row
    assert running.model.apart is None
    assert running.kernels == tuple(adapter for adapter, _ in requests)


def test_a_graph_of_decodes_of_the_base_has_one_stream_and_no_metadata_of_its_own(runner):
    """A graph computes what it computed when it was captured, whatever the model is told."""
    running = runner(GRAPHS)
    running.step((0, 1), (0, 1))
    assert not running.model.every_row
    assert (running.model.with_adapter, running.model.apart) == (None, None)


def test_nothing_of_a_step_is_left_for_the_next(runner):
    running = runner(GRAPHS)
    running.step((1, 4))
    assert running.model.apart
    running.step((1, 1))
    assert (running.model.apart, running.model.with_adapter) == (None, None)
    running.step((1, 4))
    assert not running.model.every_row
