"""The parts that users work with: command line, Python client, app builder, demo. The other packages are inside this one when
it is installed (setup.py), and beside it in a checkout."""

import os
from pathlib import Path

__version__ = "0.1.0"

# Ray starts its processes by fork. gRPC's handlers would end one in fifty of them before they become Ray's program. gRPC reads
# this variable when it is imported, which a module of this package may do before any other.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_checkout = Path(__file__).parents[1]
if (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))
del _checkout
