"""Files are data: nothing in one makes Python do anything."""

import pytest
import yaml

from prefillshare.kvshare.yaml_tree import from_yaml


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:pathlib.Path.touch [{file}]",
        "a: !!python/object/new:pathlib.Path [{file}]",
        "!!python/name:os.system",
        "- !!python/module:os",
        "!!python/tuple [1]",
    ],
)
def test_a_tag_that_would_make_a_python_object_is_refused(text, tmp_path):
    file = tmp_path / "touched"
    with pytest.raises(yaml.YAMLError, match="tag"):
        from_yaml(text.format(file=file))
    assert not file.exists()
