"""What vLLM says of its own server is not what clients of this one need to know."""

import pytest
from vllm import SamplingParams

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.vllm_refusals import as_our_errors, for_clients


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("too many (parameter=n, value=9)", "too many"),
        ("too many (fix: ask for fewer)", "too many (fix: ask for fewer)"),
        ("9 is over 8. To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable.", "9 is over 8."),
        ('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
         "tools need base.tool_call_parser, which this deployment does not set"),
        ("You must set `--enable-prompt-embeds` to input `prompt_embeds`.",
         "this deployment does not serve what the request asks for"),
        ("This vLLM engine does not support `store=True` and therefore does not support the background mode.",
         "this deployment does not serve what the request asks for"),
        ("a -- dash, --- a line, x--y", "a -- dash, --- a line, x--y"),
    ],
)  # fmt: skip
def test_advice_on_starting_vllms_own_server_is_left_out(said, told):
    assert for_clients(said) == told


def test_nor_does_a_refusal_over_grpc_advise_to_set_vllms_variables():
    with pytest.raises(InvalidInput) as refused, as_our_errors():
        SamplingParams(n=10**6)
    assert "n must be at most" in refused.value.message
    assert "VLLM_" not in str(refused.value)
