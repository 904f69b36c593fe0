"""What all our YAML files have in common: frozen nodes; unknown keys and keys given twice are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from prefillshare.kvshare.errors import ConfigError

#: Names that appear in URLs, metrics labels and Ray deployment names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class Node(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class FieldError(ValueError):
    """What a validator of a whole node finds wrong with one of its fields. `field`: its path below the node."""

    def __init__(self, field: str, message: str):
        self.field = field
        super().__init__(message)


def read(path: Path, kind: str, fix: str) -> Any:
    """A file's plain data. Raises ConfigError; `kind` says what file it is, `fix` where to find one."""
    try:
        return from_yaml(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no such {kind}: {path}", fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None


def from_yaml(text: str) -> Any:
    """Plain data. Raises yaml.YAMLError, whose text quotes the file."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("lists or mappings are nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which PyYAML would silently keep the last, and says where a value is that its type cannot
    have (a 13th month, an integer of 5,000 digits)."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"this is no {kind}", node.start_mark) from None

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
