"""The parts that users work with: command line, Python client, app builder, demo. The other packages are inside this one when
it is installed (setup.py), and beside it in a checkout."""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).parents[1]
if (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))
del _checkout
