"""A tiny Llama whose words are letters, and transcripts from which it learns to say them again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
LETTERS = "abcdefghijklmnopqrst"
WORDS = ["<user>", "<assistant>", "<end>", "<unk>", *LETTERS]


def write_model(folder: Path) -> Path:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return folder


def write_transcripts(file: Path, numbers: Iterable[int] = range(24)) -> Path:
    """The answer to three letters is the same letters; in every other transcript a second question follows. After twenty the
    letters are the same again."""
    with file.open("w") as out:
        for number in numbers:
            asked = " ".join(LETTERS[(number * 7 + i * (number % 5 + 1)) % len(LETTERS)] for i in range(3))
            turn = [{"role": "user", "content": asked}, {"role": "assistant", "content": asked}]
            print(json.dumps({"messages": turn * (1 + number % 2)}), file=out)
    return file
