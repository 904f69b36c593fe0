"""Where `cache_control` stands in a request of Anthropic's, and the request up to there."""

import pytest
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

from prefillshare.kvshare.errors import InvalidInput
from prefillshare.kvshare_vllm.surface.cache_control import breakpoints

KEEP, LONG = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}
TOOLS = [{"name": name, "input_schema": {}} for name in ("look", "leave", "swim")]
SYSTEM = [{"type": "text", "text": text} for text in ("You plan.", "Be brief.")]
MESSAGES = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "At what?"}]},
    {"role": "user", "content": [{"type": "text", "text": "The map."}, {"type": "text", "text": "Now."}]},
]


def body(**where) -> dict:
    """A request in which a block has what is given for it: `tools_1`, `system_0`, `messages_2_1`."""
    made = {
        "model": "m",
        "max_tokens": 1,
        "tools": [dict(tool) for tool in TOOLS],
        "system": [dict(block) for block in SYSTEM],
        "messages": [
            one | ({} if isinstance(one["content"], str) else {"content": [dict(block) for block in one["content"]]})
            for one in MESSAGES
        ],
    }
    for path, given in where.items():
        part, *numbers = path.split("_")
        block = made[part][int(numbers[0])]
        (block["content"][int(numbers[1])] if len(numbers) == 2 else block)["cache_control"] = given
    return made


def beginnings(**where) -> list[dict]:
    made = body(**where)
    request = AnthropicMessagesRequest.model_validate(made)
    shown = (end.beginning(request).model_dump(exclude_none=True) for end in breakpoints(made))
    return [
        {
            "tools": [tool["name"] for tool in one["tools"]],
            "system": [block["text"] for block in one["system"]],
            "messages": [
                message["content"] if isinstance(message["content"], str) else [block["type"] for block in message["content"]]
                for message in one["messages"]
            ],
        }
        for one in shown
    ]


def test_they_come_in_the_order_of_the_prompt_with_their_times():
    found = breakpoints(body(messages_2_0=KEEP, system_1=KEEP, tools_2=LONG, messages_1_1=KEEP))
    assert [(end.part, end.number, end.block, end.ttl_s) for end in found] == [
        ("tools", 2, None, 3600),
        ("system", 1, None, 300),
        ("messages", 1, 1, 300),
        ("messages", 2, 0, 300),
    ]
    assert breakpoints(body()) == []


def test_the_request_up_to_a_block_ends_with_it():
    tools, system, answer, asked = beginnings(tools_0=KEEP, system_0=KEEP, messages_1_1=KEEP, messages_2_0=KEEP)
    assert tools == {"tools": ["look"], "system": ["You plan.", "Be brief."], "messages": ["x"]}
    assert system == {"tools": ["look", "leave", "swim"], "system": ["You plan."], "messages": ["x"]}
    assert answer["messages"] == ["Look.", ["thinking", "text"]]
    assert asked["messages"] == ["Look.", ["thinking", "text"], ["text"]]
    assert asked["system"] == ["You plan.", "Be brief."]


def test_that_of_the_request_stands_behind_its_last_message():
    made = body() | {"cache_control": LONG}
    (end,) = breakpoints(made)
    assert (end.part, end.number, end.block, end.ttl_s) == ("messages", 2, None, 3600)
    assert len(end.beginning(AnthropicMessagesRequest.model_validate(made)).messages) == 3


@pytest.mark.parametrize(
    ("where", "field", "said"),
    [
        ({"messages_1_0": KEEP}, "messages.1.content.0.cache_control", "a block of type thinking cannot have it"),
        ({"system_0": {"type": "lasting"}}, "system.0.cache_control", "not of type ephemeral"),
        ({"system_0": ["ephemeral"]}, "system.0.cache_control", "not of type ephemeral"),
        ({"tools_1": KEEP | {"ttl": "1d"}}, "tools.1.cache_control.ttl", "'1d' is not known"),
        ({"tools_1": KEEP | {"ttl": ["5m"]}}, "tools.1.cache_control.ttl", "is not known"),
        ({"tools_1": KEEP | {"ttl": {}}}, "tools.1.cache_control.ttl", "'{}' is not known"),
        ({"tools_1": KEEP | {"ttl": ""}}, "tools.1.cache_control.ttl", "'' is not known"),
        ({"tools_1": KEEP | {"ttl": 300}}, "tools.1.cache_control.ttl", "'300' is not known"),
        ({"tools_1": KEEP, "messages_2_0": LONG}, "messages.2.content.0.cache_control", "what is kept for longer comes before"),
        ({f"tools_{n}": KEEP for n in range(3)} | {f"system_{n}": KEEP for n in range(2)}, "cache_control", "5 blocks have it"),
    ],
)
def test_what_cannot_be_meant_is_refused(where, field, said):
    with pytest.raises(InvalidInput, match=said) as refused:
        breakpoints(body(**where))
    assert refused.value.field == field


def test_what_is_no_list_of_blocks_has_none():
    assert breakpoints({"system": "You plan.", "messages": [{"role": "user", "content": "x"}, 3], "tools": None}) == []
