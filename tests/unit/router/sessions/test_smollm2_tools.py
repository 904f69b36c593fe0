"""The template with tools for SmolLM2: without tools the model's own, with tools one that sessions can append to."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import Rendered

from prefillshare.finetuning.tasks import tool_calls
from prefillshare.kvshare import chat_template, fingerprint
from prefillshare.router.sessions.chat import ChatLayout

#: The template in the model's folder, to the byte: the contracts of the adapters that come with us name its hash.
OWN = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
OURS = chat_template.text_of("smollm2_tools")
ADAPTERS = Path(__file__).parents[4] / "adapters"

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city.",
                                      "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "now", "description": None, "parameters": None}},
]  # fmt: skip

texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ["", "\n", " a \n\n", "{{ x }}", "<|im_end|>\n", "<tool_call>", "{% if %}", "é中"]
)
messages = st.lists(
    st.builds(dict, role=st.sampled_from(["system", "user", "assistant", "tool", "developer"]), content=texts), max_size=8
)


def called(name: str, arguments) -> dict:
    return {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_own_template_is_the_one_that_the_adapters_were_trained_with():
    for folder in ("tools", "arithmetic", "arithmetic-last-layers"):
        contract = json.loads((ADAPTERS / folder / "kv_contract.json").read_text())
        assert contract["base"]["chat_template"] == fingerprint.of_text(OWN)


@settings(max_examples=400, deadline=None)
@given(messages, st.booleans(), st.sampled_from([None, []]))
def test_without_tools_every_conversation_is_laid_out_as_the_models_own_template_does(conversation, answer, tools):
    own, ours = (Rendered(template).apply_chat_template(conversation, False, answer, tools) for template in (OWN, OURS))
    assert ours == own


def test_without_tools_sessions_append_what_they_appended_before():
    own, ours = ChatLayout(Rendered(OWN)), ChatLayout(Rendered(OURS))
    for message in ({"role": "user", "content": "hello"}, {"role": "tool", "content": "42"}):
        assert ours.opening([message]) == own.opening([message])
        for is_open in (True, False):
            assert ours.appended([1, 2], is_open, [message]) == own.appended([1, 2], is_open, [message])


def test_tools_calls_and_results_are_laid_out_in_the_form_that_hermes_reads():
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Bern?"},
        {"role": "assistant", "content": "", "tool_calls": [called("get_weather", {"city": "Bärn", "n": 1.5}),
                                                            called("now", {})]},
        {"role": "tool", "tool_call_id": "call-1", "content": "rain"},
    ]
    assert Rendered(OURS).apply_chat_template(conversation, False, True, TOOLS) == (
        "<|im_start|>system\n"
        "You answer with one call of a function. The functions:\n"
        "<tools>\n"
        '{"name": "get_weather", "description": "Weather of a city.", '
        '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}\n'
        '{"name": "now"}\n'
        "</tools>\n"
        "Answer with its name and arguments, like\n"
        "<tool_call>\n"
        '{"name": "NAME", "arguments": {"ARGUMENT": VALUE}}\n'
        "</tool_call>\n"
        "Be brief.<|im_end|>\n"
        "<|im_start|>user\nBern?<|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bärn", "n": 1.5}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("content", ["", "I look.\n", "I look. "])
@pytest.mark.parametrize("calls", [[called("now", {})], [called("now", {}), called("get_weather", {"city": "Bern"})]])
def test_an_answer_with_calls_is_laid_out_as_it_was_generated_and_as_training_lays_it_out(content, calls):
    layout = ChatLayout(Rendered(OURS), TOOLS)
    asked = [{"role": "user", "content": "Bern?"}]
    answer = {"role": "assistant", "content": content, "tool_calls": calls}
    opening = layout.opening(asked)
    generated = layout.ids(content + layout.calling(answer | {"content": ""}))
    assert layout.ids(layout.calling(answer)) == generated
    context = opening + generated
    result = [{"role": "tool", "content": "rain"}]
    assert context + layout.appended(context, True, result) == layout.opening([*asked, answer, *result])


def test_arguments_that_come_as_text_stay_as_they_are():
    layout = ChatLayout(Rendered(OURS))
    text = '{"a":1.50,  "b":"\\u00e9"}'
    assert f'"arguments": {text}}}' in layout.calling({"role": "assistant", "content": "", "tool_calls": [called("now", text)]})


@settings(max_examples=100, deadline=None)
@given(messages.filter(bool), messages, st.booleans())
def test_no_message_changes_what_is_laid_out_before_it(first, more, with_tools):
    tools = TOOLS if with_tools else None
    layout = Rendered(OURS)
    before, after = (layout.apply_chat_template(all_of, False, False, tools) for all_of in (first, [*first, *more]))
    assert after.startswith(before)


def test_the_tools_adapter_was_trained_on_this_layout():
    """Its data described the functions in the system message, and laid calls out as text: the template does the same."""
    pytest.importorskip("bfcl_eval")
    own = ChatLayout(Rendered(OWN))
    ascii_only = [pair for pair in tool_calls._live_items() if json.dumps(pair, ensure_ascii=False).isascii()][:40]
    assert len(ascii_only) == 40
    for item, call in ascii_only:
        *asked, answer = tool_calls._transcript(item, call)["messages"]
        ours = ChatLayout(Rendered(OURS), [{"type": "function", "function": function} for function in item["function"]])
        assert ours.opening(item["question"][0]) == own.opening(asked)
        calls = [called(call["name"], call["arguments"])]
        assert ours.calling({"role": "assistant", "content": "", "tool_calls": calls}) == answer["content"]
