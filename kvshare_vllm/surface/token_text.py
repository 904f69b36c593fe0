"""Where the text of each token of a response ends.

Seam: vllm/v1/engine/detokenizer.py
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer


def text_lengths(tokenizer: TokenizerLike, request: EngineCoreRequest, token_ids: Sequence[int]) -> list[int]:
    """Length of a response's text, in characters, after each of its tokens, as the output processor of `request` makes it
    before a stop text cuts it. A token that ends inside a character adds none."""
    uncut = copy(request)
    uncut.sampling_params = request.sampling_params.clone()
    uncut.sampling_params.stop = []
    detokenizer, lengths = IncrementalDetokenizer.from_new_request(tokenizer, uncut), []
    for token in token_ids:
        detokenizer.update([token], stop_terminated=False)
        lengths.append(len(detokenizer.output_text))
    return lengths
