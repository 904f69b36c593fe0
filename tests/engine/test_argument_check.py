"""vLLM's own checks of engines' arguments: correct arguments pass, a wrong one is named. No engine is started."""

from dataclasses import replace

import pytest
from engines import settings_of

from prefillshare.kvshare import chat_template

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def settings(tmp_path_factory, smollm):
    return settings_of(tmp_path_factory.mktemp("arguments"), smollm, "prefillshare", ("a",))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"role": "prefill", "adapters": {}},
        {"mode": "none"},
        {"mode": "icarus"},
        {"mode": "droidspeak", "ecache_layers": [2]},
        {"engine_args": {"max_logprobs": 5, "gpu_memory_utilization": 0.5}},
    ],
)
def test_vllm_has_nothing_against_what_runs(settings, changes):
    from prefillshare.kvshare_vllm.engine.argument_check import problems

    assert list(problems({"pool": replace(settings, **changes)})) == []


@pytest.mark.parametrize(
    ("changes", "argument", "message"),
    [
        ({"max_num_batched_tokens": 20, "max_num_seqs": 64}, "max_num_batched_tokens", "greater than or equal to max_num_seqs"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size", "attention heads (4) must be divisible"),
        ({"engine_args": {"gpu_memory_utilisation": 0.5}}, "engine_args.gpu_memory_utilisation", "did you mean gpu_memory_"),
        ({"engine_args": {"max_logprobs": 5, "seed": "x"}}, "engine_args.seed", "a valid integer"),
        ({"engine_args": {"attention_backend": "NOPE"}}, "engine_args.attention_backend", "Unknown attention backend: 'NOPE'"),
        ({"engine_args": {"max_cpu_loras": 1}}, "engine_args.max_cpu_loras", "must be >= max_loras (8)"),
        ({"engine_args": {"seed": "x", "quantization": "y"}}, "", "a valid integer"),
        ({"engine_args": {"watermark_config": {"key": 1}}}, "engine_args.watermark_config", "Model Runner V2 requires Triton"),
    ],
)
def test_what_vllm_refuses_is_named_with_its_words(settings, changes, argument, message):
    from prefillshare.kvshare_vllm.engine.argument_check import problems

    (problem,) = problems({"pool": replace(settings, **changes)})
    assert (problem["engine"], problem["argument"]) == ("pool", argument)
    assert message in problem["message"]


def test_another_model_runner_is_refused_where_the_environment_asks_for_it(settings, monkeypatch):
    from prefillshare.kvshare_vllm.engine.argument_check import problems

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    (problem,) = problems({"pool": settings})
    assert "VLLM_USE_V2_MODEL_RUNNER is '1': engines run vLLM's V1 model runner" in problem["message"]


def test_a_tool_parser_that_vllm_does_not_have_is_refused_with_those_it_has(settings):
    from prefillshare.kvshare_vllm.engine.argument_check import problems_of_base

    (problem,) = problems_of_base({"model": "", "tool_call_parser": "hermmes", "chat_template": None})
    assert (problem["engine"], problem["argument"]) == ("", "tool_call_parser")
    assert "hermes" in problem["message"]


def test_a_template_is_tried_with_the_bases_tokenizer_and_one_that_ignores_tools_is_warned_of(smollm):
    from prefillshare.kvshare_vllm.engine.argument_check import problems_of_base, warnings_of_base

    base = {"model": str(smollm), "tool_call_parser": "hermes", "chat_template": None}
    (warning,) = warnings_of_base(base)
    assert warning.startswith("base.tool_call_parser is hermes, but the chat template has no place for tools")
    assert list(warnings_of_base(base | {"tool_call_parser": None})) == []
    ours = base | {"chat_template": chat_template.text_of("smollm2_tools")}
    assert [*problems_of_base(ours), *warnings_of_base(ours)] == []
    (problem,) = problems_of_base(base | {"chat_template": "{{ messages[0].nobody.said }}"})
    assert problem["argument"] == "chat_template"
    assert "does not render: 'dict object' has no attribute 'nobody'" in problem["message"]
