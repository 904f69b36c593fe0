"""Commands to a home, as intents: Home Assistant's English sentence templates (package home-assistant-intents), over homes that
are drawn at random.

The prompt describes a home, its devices by room, and where the speaker is. The answer is the intent and its slots as JSON;
names and rooms are the home's, and a command that names no room is about the speaker's. Test and training have no template in
common: what is asked is said in other words than any that were learnt.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

from prefillshare.finetuning.tasks.base import SPLITS, Question, Task

SYSTEM = """You turn a command to a home into an intent. Answer with its name and slots, like
{"intent": "NAME", "slots": {"SLOT": VALUE}}"""
TEST_SIZE = 400
#: Shares of the templates, in percent, by a hash of their text.
TESTED, VALIDATED = 20, 8

_FLOORS = {
    "ground": ("kitchen", "hall", "living room", "dining room", "garage", "pantry", "laundry room", "guest bathroom"),
    "first": ("bedroom", "bathroom", "nursery", "office", "library", "guest room", "balcony", "dressing room"),
    "top": ("attic", "studio", "hobby room", "roof terrace", "gym", "music room"),
}
#: Domain -> names of its devices.
_DEVICES = {
    "light": ("ceiling lamp", "reading lamp", "desk lamp", "night lamp", "chandelier", "spotlights", "floor lamp"),
    "switch": ("coffee machine", "heater", "fairy lights", "air purifier", "kettle", "printer", "aquarium pump", "amplifier"),
    "fan": ("ceiling fan", "desk fan", "extractor", "tower fan"),
    "media_player": ("television", "record player", "radio", "smart speaker", "projector", "soundbar"),
    "climate": ("thermostat", "air conditioner", "floor heating", "radiator"),
    "cover": ("roller shutter", "left blind", "right blind", "curtain", "skylight", "sun sail"),
    "lock": ("side door", "front door", "cellar door", "gun cabinet", "safe"),
    "valve": ("water valve", "sprinkler", "gas valve", "drip hose"),
    "binary_sensor": ("window sensor", "motion detector", "leak detector", "door contact"),
    "sensor": ("power meter", "humidity sensor", "outdoor thermometer", "air monitor"),
    "todo": ("groceries", "chores", "packing list", "wish list"),
    "vacuum": ("robot vacuum", "hoover", "dust mop"),
    "lawn_mower": ("robot mower", "grass cutter"),
    "person": ("Amara", "Bilal", "Farah", "Jonas", "Lena", "Mirza"),
    "scene": ("movie night", "dinner time", "early morning", "party mode"),
    "script": ("good night routine", "leaving home", "water the plants", "wake up routine"),
    "button": ("doorbell", "restart router", "feed the cat", "panic button"),
    "weather": ("home forecast", "station outside"),
}  # fmt: skip
#: List that any text may fill -> texts.
_TEXTS = {
    "message": ("dinner is ready", "we leave in ten minutes", "somebody is at the door", "the movie starts now"),
    "search_query": ("jazz for the evening", "the four seasons", "news of the day", "songs about rain", "blue train"),
    "zone": ("work", "school", "the office", "grandma's"),
    "timer_name": ("pizza", "eggs", "laundry", "tea", "bread", "homework"),
    "timer_command": ("open the garage door", "turn off the oven", "close the blinds"),
    "shopping_list_item": ("oat milk", "apples", "batteries", "bread", "washing powder", "olive oil"),
    "todo_list_item": ("call the plumber", "pay the rent", "water the ferns", "book the ferry", "oil the hinges"),
}
#: Small talk, which has nothing to do with the home.
_LEFT_OUT = ("HassRespond", "HassNevermind")


@dataclass(frozen=True)
class _Home:
    """`rooms`: room -> its floor. `devices`: name -> (domain, room)."""

    rooms: dict[str, str]
    devices: dict[str, tuple[str, str]]
    speaker_in: str

    def __str__(self) -> str:
        lines = []
        for room, floor in self.rooms.items():
            here = [f"{name} ({domain})" for name, (domain, where) in self.devices.items() if where == room]
            lines.append(f"{room}, {floor} floor: {', '.join(here) or 'nothing'}")
        return "\n".join(lines) + f"\nThe speaker is in the {self.speaker_in}."


class HomeCommands(Task):
    name, max_tokens, precedes_others = "home_commands", 96, False

    def questions(self) -> list[Question]:
        return [
            Question(f"{self.name}_{number}", _messages(asked), partial(_is_right, intent))
            for number, (asked, intent) in enumerate(_commands("test", random.Random("home test"), TEST_SIZE))
        ]

    def transcripts(self, count: int, seed: int, split: str = "train") -> list[dict]:
        return [
            {"messages": [*_messages(asked), {"role": "assistant", "content": json.dumps(intent)}]}
            for asked, intent in _commands(split, random.Random(f"home {seed} {split}"), count)
        ]


def _messages(asked: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def _is_right(intent: dict, answer: str) -> bool:
    start = answer.find("{")
    try:
        given, _ = json.JSONDecoder().raw_decode(answer[start:])
        return _comparable(given) == _comparable(intent)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _comparable(intent: dict) -> tuple[str, dict[str, str]]:
    return intent["intent"], {slot: str(value).casefold() for slot, value in intent["slots"].items()}


def _commands(split: str, rng: random.Random, count: int) -> Iterator[tuple[str, dict]]:
    """(description of a home with a command, intent with slots), over templates of the split."""
    by_intent = _templates()[split]
    for _ in range(count):
        intent = rng.choice(sorted(by_intent))
        blocks = by_intent[intent]
        data, sentences = blocks[rng.choice(sorted(blocks))]
        home = _home(rng, _domains(data))
        said = _Saying(rng, home, data)
        text = " ".join(said.words(rng.choice(sentences).expression).split())
        yield f"{home}\nCommand: {text}", {"intent": intent, "slots": said.slots}


def _domains(data: Any) -> set[str]:
    """Those of the devices that a block of sentences is about; none: any."""
    return set(data.requires_context.get("domain", ()))


def _home(rng: random.Random, domains: set[str]) -> _Home:
    """One of whose devices is of one of the domains, if there are any."""
    floors = rng.sample(sorted(_FLOORS), 2)
    rooms = {room: floor for floor in floors for room in rng.sample(_FLOORS[floor], 2)}
    needed = rng.choice(sorted(domains & _DEVICES.keys())) if domains else rng.choice(sorted(_DEVICES))
    others = rng.sample(sorted(_DEVICES.keys() - {needed}), 5)
    devices = {rng.choice(_DEVICES[domain]): (domain, rng.choice(list(rooms))) for domain in rng.sample([needed, *others], 6)}
    return _Home(rooms, devices, rng.choice(list(rooms)))


class _Saying:
    """One way through a template. `slots`: those that it has filled."""

    def __init__(self, rng: random.Random, home: _Home, data: Any):
        domains = _domains(data)
        fit = [name for name, (domain, _) in home.devices.items() if not domains or domain in domains]
        self._rng, self._home, self._data = rng, home, data
        self._device = rng.choice(sorted(fit))
        self._room = home.devices[self._device][1]
        self.slots: dict[str, Any] = dict(data.slots)
        if "area" in data.requires_context:
            self.slots["area"] = home.speaker_in

    def words(self, expression: Any) -> str:
        from hassil import expression as kinds

        if isinstance(expression, kinds.TextChunk):
            return expression.original_text
        if isinstance(expression, kinds.ListReference):
            return self._value(expression)
        if isinstance(expression, kinds.RuleReference):
            rules = _intents().expansion_rules | self._data.expansion_rules
            return self.words(rules[expression.rule_name].expression)
        if isinstance(expression, kinds.Alternative):
            return self.words(self._rng.choice(expression.items))
        items = list(expression.items)
        if isinstance(expression, kinds.Permutation):
            self._rng.shuffle(items)
            return " ".join(self.words(item) for item in items)
        return "".join(self.words(item) for item in items)

    def _value(self, reference: Any) -> str:
        """The words for a list's value, which fills the slot."""
        from hassil.intents import RangeSlotList, TextSlotList

        name, slot = reference.list_name, reference.slot_name
        listed = (_intents().slot_lists | self._data.slot_lists).get(name)
        if name in _TEXTS:
            said = value = self._rng.choice(_TEXTS[name])
        elif isinstance(listed, RangeSlotList):
            number = self._rng.randrange(listed.start, listed.stop + 1, listed.step)
            said, value = str(number), int(number * (listed.multiplier or 1))
        elif isinstance(listed, TextSlotList):
            chosen = self._rng.choice(listed.values)
            said, value = self.words(chosen.text_in), chosen.value_out
        else:
            said = value = {"name": self._device, "area": self._room, "floor": self._home.rooms[self._room]}[name]
        self.slots[slot] = value
        return said


@cache
def _intents():
    from hassil.intents import Intents

    data = json.loads((files("home_assistant_intents") / "data" / "en.json").read_text(encoding="utf-8"))
    return Intents.from_dict(data)


@cache
def _templates() -> dict[str, dict[str, dict[int, tuple[Any, list]]]]:
    """Split, or "test" -> intent -> number of the block of sentences -> (the block, its templates in this split)."""
    found: dict[str, dict] = {"test": {}, **{split: {} for split in SPLITS}}
    for name, intent in _intents().intents.items():
        if name in _LEFT_OUT:
            continue
        every = [(number, data, sentence) for number, data in enumerate(intent.data) for sentence in data.sentences]
        learnt = min((sentence.text for _, _, sentence in every), key=_digest)  # what is never learnt cannot be asked
        for number, data, sentence in every:
            split = SPLITS[0] if sentence.text == learnt else _split_of(f"{name} {sentence.text}")
            found[split].setdefault(name, {}).setdefault(number, (data, []))[1].append(sentence)
    return found


def _split_of(template: str) -> str:
    share = _digest(template) % 100
    return "test" if share < TESTED else SPLITS[share < TESTED + VALIDATED]


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
