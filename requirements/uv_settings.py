"""Where pip gets packages from, as uv's environment: uv does not read pip's configuration. Prints NAME=VALUE lines."""

import ast
import os
import subprocess
import sys

#: pip's option -> uv's variable, and what stands between several values there.
NAMES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}


def settings(listed: str) -> dict[str, str]:
    """Of what `pip config list` prints. The environment goes before files."""
    found = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        option, _, value = line.partition("=")
        name = option.rpartition(".")[2]
        if name in NAMES:
            variable, between = NAMES[name]
            found[variable] = between.join(ast.literal_eval(value).split())
    return {variable: value for variable, value in found.items() if variable not in os.environ}


if __name__ == "__main__":
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    for variable, value in settings(listed).items():
        print(f"{variable}={value}")
