"""One importable name: folders of the project's root are installed as packages inside `prefillshare`."""

from setuptools import find_packages, setup

NAME = "prefillshare"
INSIDE = ("decode_service", "finetuning", "kvshare", "kvshare_vllm", "prefill_service", "proof", "protos", "router")
#: Files that commands show or name, and chat templates.
FILES = {
    "deploy.configs": ["*.yaml"],
    "deploy.grafana": ["*.json"],
    "deploy.keys": ["*.yaml"],
    "deploy.prometheus": ["*.yaml"],
    "kvshare.chat_templates": ["*.jinja"],
}

#: What a browser loads from the router.
PAGE = {"router.ui": ["static/*"]}

inside = [*find_packages(include=[pattern for name in INSIDE for pattern in (name, f"{name}.*")]), *FILES]
setup(
    packages=[NAME, f"{NAME}.client", *(f"{NAME}.{name}" for name in inside)],
    package_dir={NAME: NAME} | {f"{NAME}.{name}": name.replace(".", "/") for name in inside},
    package_data={"": ["py.typed", "*.proto", "*.pyi"]} | {f"{NAME}.{name}": kinds for name, kinds in (FILES | PAGE).items()},
)
