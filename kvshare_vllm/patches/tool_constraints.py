"""What tool calls are held to (base.tool_strict_level), and under which name a client is told of a schema that cannot be.

- At the level `forced`, a tool that says nothing of `strict` has its schema obeyed where its call is forced: with tool_choice
  "required" or a tool's name. vLLM knows only levels at which every answer is constrained, which costs each token something
  and refuses tools that nobody may call.
- Parallel calls that are forced stand in lines of their own, as models write them that know the `hermes` format, and as chat
  templates lay them out; vLLM allows nothing between two.

Seam: vllm/parser/abstract_parser.py (DelegatingParser.adjust_request, _apply_structural_tag),
vllm/tool_parsers/structural_tag_registry.py (_VLLM_STRUCTURAL_TAG_REGISTRY, _with_tool_strict)

Goes when: vLLM has such a level, and its tag of `hermes` a line break between calls.
"""

from __future__ import annotations

from vllm.parser.abstract_parser import DelegatingParser
from vllm.tool_parsers import structural_tag_registry
from xgrammar.structural_tag import TagsWithSeparatorFormat

from prefillshare.kvshare_vllm.asked_formats import ToolsFormat

FORCED = "forced"


def vllm_level(level: str) -> str:
    """vLLM's --tool-strict-level."""
    return "auto" if level == FORCED else level


def hold_forced_calls(parser_class: type | None, level: str) -> None:
    """`parser_class`: that of an app which was built after `install`."""
    if parser_class is not None:
        parser_class.forced_calls_obey = level == FORCED


def install() -> None:
    """Called once per process, before vLLM's app is built; idempotent."""
    if hasattr(DelegatingParser, "forced_calls_obey"):
        return
    DelegatingParser.forced_calls_obey = False
    DelegatingParser._apply_structural_tag = _obeying(DelegatingParser._apply_structural_tag)
    DelegatingParser.adjust_request = _named_as_tools(DelegatingParser.adjust_request)
    registry = structural_tag_registry._VLLM_STRUCTURAL_TAG_REGISTRY
    registry["hermes"] = _in_lines(registry["hermes"])


def _obeying(apply):
    def applied(self, request):
        if not (self.forced_calls_obey and request.tools) or request.tool_choice in (None, "none", "auto"):
            return apply(self, request)
        tools, strictly = request.tools, structural_tag_registry._with_tool_strict
        try:
            request.tools = [strictly(tool, True) if _says_nothing(tool) else tool for tool in tools]
            return apply(self, request)
        finally:
            request.tools = tools

    return applied


def _says_nothing(tool) -> bool:
    return getattr(getattr(tool, "function", tool), "strict", None) is None


def _named_as_tools(adjust):
    def adjusted(self, request):
        before = request.structured_outputs
        request = adjust(self, request)
        form = request.structured_outputs
        if form is not None and form is not before:
            request.structured_outputs = ToolsFormat.of(form)
        return request

    return adjusted


def _in_lines(build):
    def built(*given, **more):
        tag = build(*given, **more)
        if isinstance(tag.format, TagsWithSeparatorFormat):
            tag.format.separator = "\n"
        return tag

    return built
