"""The base's tokenizer, with the chat template that conversations are laid out by."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer


def tokenizer_of(base: str | Path, template: str | None = None):
    """`template`: text of the chat template to use instead of the base's own."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
