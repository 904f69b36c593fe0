"""Any message of a protobuf type, as a hypothesis strategy."""

from __future__ import annotations

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_F = FieldDescriptor
_WORDS = st.sampled_from(("", "s", "planner", "base", "user", "system", "{}", "[", "\x00", "a\nb", "\ufffd" * 50, "x" * 3000))
_TEXTS = _WORDS | st.text(max_size=12)
_DOUBLES = st.floats() | st.sampled_from((0.0, -1.0, 1e-12, 0.5, 1.0, 2.0, 1e300))


def _integers(bits: int, signed: bool = True):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return st.sampled_from((0, 1, 2, 5, 100, high)) | st.integers(low, high)


_SCALARS = {
    _F.CPPTYPE_INT32: _integers(32), _F.CPPTYPE_INT64: _integers(64), _F.CPPTYPE_UINT32: _integers(32, False),
    _F.CPPTYPE_UINT64: _integers(64, False), _F.CPPTYPE_DOUBLE: _DOUBLES, _F.CPPTYPE_FLOAT: st.floats(width=32),
    _F.CPPTYPE_BOOL: st.booleans(), _F.CPPTYPE_STRING: _TEXTS,
}  # fmt: skip


@st.composite
def messages(draw, kind: type[Message], most: int = 4):
    """`most`: fields that are set, in each message, and entries of each list."""
    message = kind()
    fill(draw, message, most)
    return message


def fill(draw, message: Message, most: int) -> None:
    fields = list(message.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(fields), max_size=most, unique_by=lambda f: f.name)) if fields else ():
        if field.message_type and field.message_type.GetOptions().map_entry:
            key, value = (_scalar(part) for part in field.message_type.fields)
            getattr(message, field.name).update(draw(st.dictionaries(key, value, max_size=most)))
        elif field.message_type:
            made = getattr(message, field.name)
            for _ in range(draw(st.integers(0, most)) if field.is_repeated else 1):
                fill(draw, made.add() if field.is_repeated else made, max(1, most - 1))
            if not field.is_repeated:
                made.SetInParent()
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(_scalar(field), max_size=most)))
        else:
            setattr(message, field.name, draw(_scalar(field)))


def _scalar(field: FieldDescriptor):
    if field.cpp_type == _F.CPPTYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values]) | st.integers(-5, 100)
    return _SCALARS[field.cpp_type]


