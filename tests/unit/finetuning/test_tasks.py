"""Task suites: the checkers tell right from wrong, training data teaches what the checkers want, and holds no test question."""

import hashlib
import json
from itertools import chain
from pathlib import Path

import pytest

from prefillshare.finetuning.evaluate import Score, difference
from prefillshare.finetuning.tasks import TASKS, arithmetic, home_commands, tool_calls, write_transcripts
from prefillshare.finetuning.tasks.base import check_disjoint, in_company, together
from prefillshare.finetuning.tasks.synthetic_calls import synthetic_calls
from prefillshare.finetuning.tasks.tool_calls import TESTED, parse_call
from prefillshare.kvshare.errors import ConfigError, InvalidInput

pytestmark = pytest.mark.slow

ADAPTERS = Path(__file__).parents[3] / "adapters"

SIZES = {"bfcl_simple_python": 400, "bfcl_multiple": 200, "arithmetic": 500, "home_commands": 400}
SIZES |= {f"{name}_tools": size for name, size in SIZES.items() if name.startswith("bfcl")}
#: Beginning of a suite's name -> whether an answer is of the form that it teaches.
FORM = {"bfcl": parse_call, "arithmetic": lambda answer: "####" in answer, "home": lambda answer: json.loads(answer)["intent"]}
#: A right answer to the first question of each.
RIGHT = {
    "bfcl_simple_python": """<tool_call>
{"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}
</tool_call>""",
    "bfcl_multiple": '{"name": "triangle_properties.get", "arguments": {"side1": 5, "side2": 4, "side3": 3}}',
}


@pytest.mark.parametrize("name", TASKS)
def test_the_test_set_is_whole_and_always_the_same(name):
    first, second = TASKS[name].questions(), TASKS[name].questions()
    assert len(first) == SIZES[name]
    assert [q.messages for q in first] == [q.messages for q in second]
    assert len({q.name for q in first}) == len(first)


@pytest.mark.parametrize("name", RIGHT)
def test_bfcls_checker_tells_right_from_wrong(name):
    question, *_ = TASKS[name].questions()
    assert question.is_right(RIGHT[name])
    assert not question.is_right(RIGHT[name].replace("5", "6"))
    assert not question.is_right("I would call a function.")
    assert not question.is_right("")


def test_a_result_is_the_number_after_the_hashes():
    question, *_ = TASKS["arithmetic"].questions()
    right = next(n for n in range(100_000) if question.is_right(f"#### {n}"))
    assert question.is_right(f"So it is {right + 1}? No.\n#### {right}")
    assert not question.is_right(f"It is {right}.")
    assert not question.is_right(f"#### {right + 1}")


def test_an_intent_is_right_with_the_slots_that_were_said():
    question = next(q for q in TASKS["home_commands"].questions() if "temp to 88" in q.messages[-1]["content"])
    right = '{"intent": "HassClimateSetTemperature", "slots": {"name": "air conditioner", "temperature": 88}}'
    assert question.is_right(right)
    assert question.is_right("So: " + right.replace("88", '"88"').replace("air", "Air") + ".")
    changes = (("88", "8"), ("Set", "Get"), (', "temperature": 88', ""), ("88", '88, "area": "x"'))
    wrong = [right.replace(*change) for change in changes]
    for answer in (*wrong, right[:-1], "HassClimateSetTemperature", '{"intent": []}', "[]", ""):
        assert not question.is_right(answer), answer


def test_a_command_that_names_no_room_is_about_the_speakers():
    made = [(t["messages"][-2]["content"], t["messages"][-1]["content"]) for t in TASKS["home_commands"].transcripts(400, 0)]
    here = [(asked, json.loads(answer)) for asked, answer in made if asked.endswith(" in here")]
    assert here
    for asked, intent in here:
        assert f"The speaker is in the {intent['slots']['area']}." in asked


def test_commands_are_asked_by_other_templates_than_were_learnt():
    templates = {
        split: {(intent, each.text) for intent, blocks in of.items() for _, found in blocks.values() for each in found}
        for split, of in home_commands._templates().items()
    }
    assert {split: len(found) for split, found in templates.items()} == {"test": 164, "train": 628, "validation": 57}
    assert not templates["test"] & (templates["train"] | templates["validation"])
    assert {intent for intent, _ in templates["test"]} <= {intent for intent, _ in templates["train"]}


def test_in_company_only_the_own_turn_is_learnt():
    def transcript(n):
        return {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}

    own, others = [transcript(n) for n in range(50)], [transcript(n) for n in range(100, 120)]
    made = in_company(own, others, 2, seed=3)
    assert [t["messages"][-2:] for t in made] == [t["messages"] for t in own]
    before = [t["messages"][:-2] for t in made]
    assert {len(messages) // 2 for messages in before} == {0, 1, 2}
    assert all(m["weight"] == 0 for messages in before for m in messages if m["role"] == "assistant")
    assert in_company(own, others, 2, seed=3) == made != in_company(own, others, 2, seed=4)


def test_together_every_transcript_is_once_and_beside_others_of_other_suites():
    suites = [
        [{"messages": [{"role": "user", "content": f"{suite}{n}"}]} for n in range(count)]
        for suite, count in (("a", 9), ("b", 9), ("c", 4))
    ]
    made = together(suites, 2, seed=1)
    asked = [[message["content"] for message in transcript["messages"]] for transcript in made]
    assert sorted(chain(*asked)) == sorted(t["messages"][0]["content"] for suite in suites for t in suite)
    assert {len(one) for one in asked} == {1, 2}
    assert all(len({content[0] for content in one}) == len(one) for one in asked)
    assert len({tuple(content[0] for content in one) for one in asked if len(one) == 2}) > 3  # in any order
    assert made == together(suites, 2, seed=1) != together(suites, 2, seed=2)
    with pytest.raises(InvalidInput, match="offer tools"):
        together([[{"messages": [], "tools": [{}]}]], 2, seed=1)


def answer_of(message):
    """As text, with a call as a model writes it."""
    return json.dumps(message["tool_calls"][0]["function"]) if "tool_calls" in message else message["content"]


def test_suites_with_tools_ask_the_same_with_json_schemas():
    types = set()

    def look(schema):
        types.add(schema.get("type"))
        for inner in (*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])):
            look(inner)

    for name in ("bfcl_simple_python", "bfcl_multiple"):
        plain, offering = TASKS[name], TASKS[f"{name}_tools"]
        for asked, offered in zip(plain.questions(), offering.questions(), strict=True):
            assert (offered.name, offered.messages[-1]) == (asked.name, asked.messages[-1])
            assert not asked.tools
            for tool in offered.tools:
                assert f'"name": "{tool["function"]["name"]}"' in asked.messages[0]["content"]
                look(tool["function"]["parameters"])
        calls = [[answer_of(t["messages"][-1]) for t in suite.transcripts(60, seed=3)] for suite in (plain, offering)]
        assert [parse_call(call) for call in calls[0]] == [parse_call(call) for call in calls[1]]
    assert types <= {"object", "string", "integer", "number", "boolean", "array", None}


def test_data_that_recipes_name_does_not_change_because_there_are_more_suites(tmp_path):
    """adapters/tools says which data it was made from: the same command has to give it."""
    write_transcripts([TASKS["bfcl_simple_python"]], tmp_path / "tools.jsonl", 3600, others=1)
    made = hashlib.sha256((tmp_path / "tools.jsonl").read_bytes()).hexdigest()
    assert f"sha256 {made[:16]}" in (ADAPTERS / "tools" / "kv_contract.json").read_text()


@pytest.mark.parametrize("name", TASKS)
def test_training_data_is_right_and_holds_no_test_question(name):
    transcripts = TASKS[name].transcripts(300, seed=1)
    assert len(transcripts) == 300
    assert transcripts == TASKS[name].transcripts(300, seed=1)
    roles = ["user", "assistant"] if TASKS[name].offers_tools else ["system", "user", "assistant"]
    assert [m["role"] for m in transcripts[0]["messages"]] == roles
    for task in TASKS.values():
        check_disjoint(transcripts, task.questions())
    answers = [answer_of(t["messages"][-1]) for t in transcripts]
    assert all(map(FORM[name.partition("_")[0]], answers))


@pytest.mark.parametrize("name", TASKS)
def test_splits_and_seeds_have_no_question_in_common(name):
    def asked(seed, split):
        return {t["messages"][-2]["content"] for t in TASKS[name].transcripts(400, seed, split)}

    assert len(asked(1, "train") & asked(1, "validation")) <= 4  # two problems may come out alike
    assert asked(1, "train") != asked(2, "train")


def test_training_calls_are_about_other_functions_than_the_test_questions():
    tested = {name for category in TESTED for _, truth in tool_calls._items(category) for call in truth for name in call}
    trained = {call["name"] for _, call in tool_calls._live_items()}
    assert len(trained) > 100
    assert not tested & trained


def test_synthetic_calls_are_right_by_bfcls_checker():
    for item, call in synthetic_calls(200, seed=3):
        truth = [{call["name"]: {key: [value] for key, value in call["arguments"].items()}}]
        for function in item["function"]:
            for key in function["parameters"]["properties"]:
                if function["name"] == call["name"]:
                    truth[0][call["name"]].setdefault(key, [""])
        assert tool_calls._is_right(item, truth, "multiple", json.dumps(call)), (item, call)


def test_arithmetics_training_answers_are_right():
    items = arithmetic._dataset(50, seed=5)
    assert all(arithmetic._is_right(item, item["metadata"]["answer_cot"]) for item in items)


def test_a_test_question_in_the_training_data_is_found():
    question = TASKS["bfcl_multiple"].questions()[7]
    said = {"role": "user", "content": f"{question.messages[-1]['content'].upper()}\nUse a function!"}
    with pytest.raises(ConfigError, match=question.name):
        check_disjoint([{"messages": [said]}], TASKS["bfcl_multiple"].questions())


@pytest.mark.parametrize(
    ("answer", "call"),
    [('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', {"f": {"a": 1}}),
     ('{"name": "f", "arguments": {}} and so', {"f": {}}), ('{"name": "f"}', None),
     ("f(a=1)", None), ('{"name": "f", "arguments": 3}', None), ("", None)],
)  # fmt: skip
def test_the_first_call_of_an_answer_is_read(answer, call):
    assert parse_call(answer) == call


def test_an_interval_is_wilsons():
    low, high = Score(8, 10).interval
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert str(Score(0, 100)).startswith("0.0 (0.0 to 3.7")


def test_training_calls_give_all_required_arguments():
    for transcript in TASKS["bfcl_multiple"].transcripts(200, seed=2):
        system, _, answer = (m["content"] for m in transcript["messages"])
        listed = system.partition("<tools>")[2].partition("</tools>")[0].strip().splitlines()
        functions = {function["name"]: function for function in map(json.loads, listed)}
        ((name, arguments),) = parse_call(answer).items()
        assert set(functions[name]["parameters"]["required"]) <= set(arguments)


def test_a_difference_counts_questions_that_one_alone_gets_right():
    right, wrong = [True] * 40 + [False] * 60, [False] * 40 + [True] * 60
    same = difference(right, right)
    assert same.mean == 0
    assert same.interval[0] == -same.interval[1]
    assert abs(same.interval[1]) < 0.03
    apart = difference(right[:50] + wrong[50:], right)
    assert (apart.only_first, apart.only_second, apart.mean) == (50, 0, 0.5)
    assert 0.39 < apart.interval[0] < 0.5 < apart.interval[1] < 0.61
