"""A tokenizer and chat template that one can read."""


class Tokenizer:
    """One id per character; a template of the usual kind, with a default system message at the beginning."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) for c in text]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        text = "" if messages[0]["role"] == "system" else "<system:be kind>\n"
        text += "".join(f"<{m['role']}:{m['content']}>\n" for m in messages)
        return text + ("<assistant:" if add_generation_prompt else "")


def text(ids):
    return "".join(map(chr, ids))
