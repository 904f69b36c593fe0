"""A tokenizer and chat template whose output is readable."""

import json


class Tokenizer:
    """One id per character; a template of the usual kind, with a default system message at the beginning."""

    bos_token = None

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, tools=()):
        assert not tokenize
        text = "" if messages[0]["role"] == "system" else "<system:be kind>\n"
        text += "".join(f"<{m['role']}:{m['content']}>\n" for m in messages)
        return text + ("<assistant:" if add_generation_prompt else "")


class ToolTokenizer(Tokenizer):
    """A tokenizer whose template puts tools at the beginning, and the calls of an answer after its text."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, tools=()):
        written = [m | {"content": m["content"] + "".join(map(_called, m.get("tool_calls", ())))} for m in messages]
        offered = "".join(f"<tool:{json.dumps(tool['function'])}>\n" for tool in tools)
        return offered + super().apply_chat_template(written, tokenize, add_generation_prompt)


class Chats:
    """Lays out chats by a tokenizer of this kind, in the place of vLLM's chat service."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def render(self, messages, answer, tools=None):
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer, tools=tools or ())


def _called(call):
    return f"[{call['function']['name']} {json.dumps(call['function']['arguments'])}]"


def text(ids):
    return "".join(map(chr, ids))
