"""Function calls made from a seed: random schemas, requests that name every value, and the right call for each.

They teach the form: choose the function that the request is about, give each value its type, leave out what is not named. Half
of the parameters have names and values of words drawn at random (reasoning-gym's lists), which only the prompt can tell.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import cache

_VERBS = (
    "book", "cancel", "compute", "convert", "create", "estimate", "fetch", "filter", "find", "list", "move", "order",
    "plan", "rank", "remove", "rename", "reserve", "schedule", "search", "send", "set", "sort", "track", "update",
)  # fmt: skip
_THINGS = (
    "account", "alarm", "appointment", "book", "building", "camera", "cargo", "concert", "course", "delivery",
    "document", "employee", "exam", "ferry", "flight", "forecast", "garden", "hotel", "image", "invoice", "language",
    "lens", "loan", "machine", "medicine", "meeting", "museum", "network", "orbit", "parcel", "patient", "playlist",
    "portfolio", "recipe", "river", "route", "sample", "sensor", "shift", "stadium", "survey", "tax", "telescope",
    "ticket", "train", "trip", "vehicle", "warehouse", "workout",
)  # fmt: skip
_GROUPS = ("", "", "api.", "tools.", "office.", "lab.", "city.", "home.")
_NAMES = (
    "Amara", "Bilal", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ivan", "Jonas", "Kofi", "Lena", "Mirza",
    "Nora",
)  # fmt: skip
_PLACES = (
    "Accra", "Bergen", "Cusco", "Dakar", "Essen", "Florence", "Ghent", "Hanoi", "Izmir", "Jaipur", "Kyoto", "Lima",
    "Malmo",
)  # fmt: skip
_WORDS = (
    "amber", "basic", "central", "daily", "eastern", "fast", "green", "hourly", "indoor", "jazz", "light", "manual",
)  # fmt: skip
#: Parameter name -> (type, description).
_PARAMETERS = {
    "name": ("string", "Name of the person it is for."), "city": ("string", "City."), "origin": ("string", "Where it begins."),
    "destination": ("string", "Where it ends."), "date": ("string", "Date as YYYY-MM-DD."), "count": ("integer", "How many."),
    "year": ("integer", "Year."), "distance": ("float", "Distance in kilometres."), "weight": ("float", "Weight in kilograms."),
    "temperature": ("float", "Temperature in degrees Celsius."), "limit": ("integer", "Most results."),
    "category": ("string", "Category."), "urgent": ("boolean", "Whether it is urgent."),
    "rate": ("float", "Rate per year."), "duration": ("integer", "Duration in minutes."),
    "tags": ("array", "Tags to attach."), "values": ("array", "Numbers to use."),
    "unit": ("string", "Unit of the result."),
}  # fmt: skip
_ASKS = ("Please {}.", "I need you to {}.", "Can you {}?", "{}.", "Could you {} for me?", "I want to {}.")
#: How a request states the value of an invented parameter.
_SAYS = ("with a {name} of {value}", "with {value} as the {name}", "{name} {value}", "where the {name} is {value}",
         "using {value} for the {name}", "{name}: {value}")  # fmt: skip
_KINDS = ("string", "string", "string", "integer", "integer", "float", "boolean", "array", "enum")


def synthetic_calls(count: int, seed: int | str) -> Iterator[tuple[dict, dict]]:
    """(question with its functions in BFCL's form, the call that is right)."""
    rng = random.Random(f"synthetic calls {seed}")
    for _ in range(count):
        functions = list({f["name"]: f for f in (_function(rng) for _ in range(rng.choice((1, 1, 2, 3, 4))))}.values())
        chosen = rng.choice(functions)
        arguments, phrases = {}, []
        for name in chosen["parameters"]["properties"]:
            if name in chosen["parameters"]["required"] or rng.random() < 0.5:
                about = chosen["parameters"]["properties"][name]
                arguments[name], phrase = _argument(name, rng) if name in _PARAMETERS else _said(name, about, rng)
                phrases.append(phrase)
        rng.shuffle(phrases)
        verb, thing = chosen["name"].rsplit(".", 1)[-1].split("_", 1)
        request = f"{verb} the {thing} " + _listed(phrases)
        asked = rng.choice(_ASKS).format(request)
        question = {"question": [[{"role": "user", "content": asked[0].upper() + asked[1:]}]], "function": functions}
        yield question, {"name": chosen["name"], "arguments": arguments}


def _function(rng: random.Random) -> dict:
    verb, thing = rng.choice(_VERBS), rng.choice(_THINGS)
    properties = {}
    for _ in range(rng.randint(1, 4)):
        name, about = _known(rng) if rng.random() < 0.5 else _invented(thing, rng)
        properties.setdefault(name, about)
    names = list(properties)
    required = [name for number, name in enumerate(names) if number == 0 or rng.random() < 0.6]
    for name in names:
        if name not in required and rng.random() < 0.5:
            properties[name]["description"] += f" Default is {json.dumps(_value(properties[name], rng))}."
    return {
        "name": f"{rng.choice(_GROUPS)}{verb}_{thing}",
        "description": f"{verb.capitalize()} a {thing}.",
        "parameters": {"type": "dict", "properties": properties, "required": required},
    }


def _known(rng: random.Random) -> tuple[str, dict]:
    name = rng.choice(list(_PARAMETERS))
    kind, description = _PARAMETERS[name]
    about = {"type": kind, "description": description}
    if kind == "array":
        about["items"] = {"type": "string" if name == "tags" else "integer"}
    return name, about


def _invented(thing: str, rng: random.Random) -> tuple[str, dict]:
    words, kind = [_word(rng) for _ in range(rng.choice((1, 1, 2, 2, 3)))], rng.choice(_KINDS)
    about: dict = {"type": kind, "description": f"The {' '.join(words)} of the {thing}."}
    if kind == "array":
        about["items"] = {"type": rng.choice(("integer", "string", "float"))}
    if kind == "enum":
        about |= {"type": "string", "enum": [_word(rng) for _ in range(rng.randint(2, 4))]}
    return "_".join(words), about


def _value(about: dict, rng: random.Random) -> object:
    """A value of an invented parameter's type."""
    if "enum" in about:
        return rng.choice(about["enum"])
    match about["type"]:
        case "integer":
            return rng.randint(1, 10 ** rng.randint(1, 5))
        case "float":
            return round(rng.uniform(0.01, 10 ** rng.randint(0, 3)), rng.randint(1, 3))
        case "boolean":
            return rng.random() < 0.5
        case "array":
            return [_value(about["items"], rng) for _ in range(rng.randint(1, 4))]
    words = [_word(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return " ".join(word.capitalize() for word in words) if rng.random() < 0.5 else " ".join(words)


def _said(name: str, about: dict, rng: random.Random) -> tuple[object, str]:
    """(value of an invented parameter, how a request states it)"""
    words, value = name.replace("_", " "), _value(about, rng)
    if isinstance(value, bool):
        return value, f"{'with' if value else 'without'} {words}"
    text = _listed(list(map(str, value))) if isinstance(value, list) else str(value)
    if isinstance(value, str) and rng.random() < 0.2:
        text = f'"{text}"'
    return value, rng.choice(_SAYS).format(name=words, value=text)


def _word(rng: random.Random) -> str:
    """A word of a story or, less often, of a dictionary."""
    return rng.choice(_words("in_the_year_2889.txt" if rng.random() < 0.7 else "words3to10.txt"))


@cache
def _words(file: str) -> list[str]:
    from reasoning_gym.data import read_data_file

    found = dict.fromkeys(re.findall(r"\b[a-z]+\b", read_data_file(file)))
    return [word for word in found if 4 <= len(word) <= 9]


def _argument(name: str, rng: random.Random) -> tuple[object, str]:
    """(value, how a request states it)"""
    match name:
        case "name":
            return (value := rng.choice(_NAMES)), f"for {value}"
        case "city":
            return (value := rng.choice(_PLACES)), f"in {value}"
        case "origin":
            return (value := rng.choice(_PLACES)), f"from {value}"
        case "destination":
            return (value := rng.choice(_PLACES)), f"to {value}"
        case "date":
            value = f"20{rng.randint(20, 35)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
            return value, f"on {value}"
        case "urgent":
            return (value := rng.random() < 0.5), "urgently" if value else "without urgency"
        case "tags":
            return (value := rng.sample(_WORDS, rng.randint(1, 3))), f"with the tags {_listed(value)}"
        case "values":
            value = [rng.randint(0, 99) for _ in range(rng.randint(2, 5))]
            return value, f"with the values {_listed(list(map(str, value)))}"
        case "year":
            return (value := rng.randint(1900, 2035)), f"for the year {value}"
        case "category" | "unit":
            return (value := rng.choice(_WORDS)), f'with {name} "{value}"'
    if _PARAMETERS[name][0] == "integer":
        return (value := rng.randint(1, 500)), f"with a {name} of {value}"
    return (value := round(rng.uniform(0.1, 300), rng.randint(1, 2))), f"with a {name} of {value}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
