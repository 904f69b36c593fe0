"""A chat template as a tokenizer of transformers renders it, without a tokenizer."""

from __future__ import annotations

from transformers.utils.chat_template_utils import render_jinja_template


class Rendered:
    """One id per character."""

    def __init__(self, template: str):
        self.template = template

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False, tools=None):
        made, _ = render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
        )
        return made[0]
