"""Function calls made from a seed: schemas nobody wrote, requests that name every value, the call that follows.

They teach the form: choose the function the request is about, give each value its type, leave out what is not named.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

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


def synthetic_calls(count: int, seed: int | str) -> Iterator[tuple[dict, dict]]:
    """(question with its functions in BFCL's form, the call that is right)."""
    rng = random.Random(f"synthetic calls {seed}")
    for _ in range(count):
        functions = list({f["name"]: f for f in (_function(rng) for _ in range(rng.choice((1, 1, 2, 3, 4))))}.values())
        chosen = rng.choice(functions)
        arguments, phrases = {}, []
        for name in chosen["parameters"]["properties"]:
            if name in chosen["parameters"]["required"] or rng.random() < 0.5:
                arguments[name], phrase = _argument(name, rng)
                phrases.append(phrase)
        rng.shuffle(phrases)
        verb, thing = chosen["name"].rsplit(".", 1)[-1].split("_", 1)
        request = f"{verb} the {thing} " + _listed(phrases)
        asked = rng.choice(_ASKS).format(request)
        question = {"question": [[{"role": "user", "content": asked[0].upper() + asked[1:]}]], "function": functions}
        yield question, {"name": chosen["name"], "arguments": arguments}


def _function(rng: random.Random) -> dict:
    verb, thing = rng.choice(_VERBS), rng.choice(_THINGS)
    names = rng.sample(list(_PARAMETERS), rng.randint(1, 4))
    properties = {}
    for name in names:
        kind, description = _PARAMETERS[name]
        properties[name] = {"type": kind, "description": description}
        if kind == "array":
            properties[name]["items"] = {"type": "string" if name == "tags" else "integer"}
    required = [name for number, name in enumerate(names) if number == 0 or rng.random() < 0.6]
    return {
        "name": f"{rng.choice(_GROUPS)}{verb}_{thing}",
        "description": f"{verb.capitalize()} a {thing}.",
        "parameters": {"type": "dict", "properties": properties, "required": required},
    }


def _argument(name: str, rng: random.Random) -> tuple[object, str]:
    """(value, how a request says it)"""
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
