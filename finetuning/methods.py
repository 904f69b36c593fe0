"""Training methods: what is trained, and what the decoder sees of the context. One class per method.

    prefillshare  every response is generated over base KV of all that is before its first input (arXiv 2602.12029, R1), which
                  is the prompt's last token, or an earlier one: then the decoder computes its own end of the prompt
    icarus        every token is predicted over base KV of all tokens up to it (arXiv 2603.13281)
    ordinary      the decoder computes all KV itself, as in ordinary fine-tuning; for comparison
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefillshare.finetuning.transcripts import Example
from prefillshare.kvshare.modes import get_mode

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class View:
    """What the decoder computes of one example. S inputs, L base tokens.

    `inputs`: positions it processes; the logits at input i are for the token at inputs[i] + 1.
    `is_response`: [S], whether that token is to be learnt.
    `base_tokens`: L, how many leading tokens are seen as base KV.
    `base_seen`: [S, L] and `own_seen`: [S, S], what each input attends to; `own_seen` is None if own KV is never seen.
    """

    inputs: torch.Tensor
    is_response: torch.Tensor
    base_tokens: int
    base_seen: torch.Tensor
    own_seen: torch.Tensor | None


class Method(ABC):
    name: str
    #: Mode in which a decoder that was trained this way is served.
    sharing: str
    lora_modules: Sequence[str]
    #: Whether the prompt's KV is the base's, and whether the decoder computes KV of its own.
    base_prompt: bool = True
    own_kv: bool = True
    #: How many of a prompt's last tokens the decoder computes itself where the prompt's KV is the base's.
    own_tokens: int = 1

    def __str__(self) -> str:
        return self.name

    def base_tokens(self, prompt: int) -> int:
        """How many leading tokens of a prompt of so many the decoder sees as base KV."""
        return prompt - 1 if self.base_prompt else 0

    @abstractmethod
    def view(self, example: Example) -> View: ...


class PrefillShare(Method):
    """`own_tokens`: how many of a prompt's last tokens the decoder computes itself."""

    name, sharing, lora_modules = "prefillshare", "prefillshare", ALL_LINEAR

    def __init__(self, own_tokens: int = 1):
        self.own_tokens = own_tokens

    def __str__(self) -> str:
        return self.name + (f" with its own last {self.own_tokens} tokens of a prompt" if self.own_tokens > 1 else "")

    def base_tokens(self, prompt: int) -> int:
        return get_mode(self.sharing).handoff_tokens(prompt, own_tokens=self.own_tokens)

    def view(self, example: Example) -> View:
        spans = [(self.base_tokens(start), start, end) for start, end in example.responses]
        inputs = torch.cat([torch.arange(first, end - 1) for first, _, end in spans])
        segment = torch.cat([torch.full((end - 1 - first,), number) for number, (first, _, end) in enumerate(spans)])
        firsts, starts, _ = (torch.tensor(column)[segment] for column in zip(*spans, strict=True))
        base_tokens = spans[-1][0]
        own = (segment[:, None] == segment) & (inputs[:, None] >= inputs)
        return View(inputs, inputs + 1 >= starts, base_tokens, torch.arange(base_tokens) < firsts[:, None], own)


class Icarus(Method):
    name, sharing, lora_modules = "icarus", "icarus", sorted(get_mode("icarus").adapter_modules)
    own_kv = False

    def view(self, example: Example) -> View:
        inputs, _ = _response_inputs(example)
        base_tokens = len(example.token_ids) - 1
        seen = torch.arange(base_tokens) <= inputs[:, None]
        return View(inputs, torch.ones_like(inputs, dtype=torch.bool), base_tokens, seen, None)


class Ordinary(Method):
    name, sharing, lora_modules = "ordinary", "none", ALL_LINEAR
    base_prompt = False

    def view(self, example: Example) -> View:
        inputs = torch.arange(len(example.token_ids) - 1)
        learnt = torch.zeros(len(example.token_ids), dtype=torch.bool)
        for start, end in example.responses:
            learnt[start:end] = True
        seen = inputs[:, None] >= inputs
        return View(inputs, learnt[1:], 0, torch.zeros(len(inputs), 0, dtype=torch.bool), seen)


METHODS: dict[str, Method] = {method.name: method for method in (PrefillShare(), Icarus(), Ordinary())}


def method_of(name: str, own_tokens: int = 1) -> Method:
    """The method by which a recipe's `method` trains, with this many own tokens of the prompt. Raises KeyError."""
    method = METHODS["ordinary" if name == "base" else name]
    return PrefillShare(own_tokens) if isinstance(method, PrefillShare) else method


def _response_inputs(example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions from which response tokens are predicted, and the number of the response to which each belongs."""
    spans = example.responses
    inputs = torch.cat([torch.arange(start - 1, end - 1) for start, end in spans])
    return inputs, torch.cat([torch.full((end - start,), number) for number, (start, end) in enumerate(spans)])
