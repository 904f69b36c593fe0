"""Training data: chat transcripts as token ids, laid out as the server lays out a session (router/sessions/chat.py).

A line of JSONL is one of
    {"messages": [{"role": "system"|"user"|"assistant"|"tool", "content": "..."}, ...]}
    {"prompt": "...", "response": "..."}
Every assistant message is a response to be learnt, unless it has "weight": 0: then it is another decoder's, and is context like
everything else. A transcript with several responses trains in one pass. `tools` beside `messages`, and `tool_calls` of an
assistant message, are laid out by the base's chat template, as over HTTP; a template that leaves them out is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefillshare.finetuning import records
from prefillshare.finetuning.records import Chat, Text
from prefillshare.kvshare import fingerprint
from prefillshare.kvshare.errors import ConfigError, InvalidInput
from prefillshare.router.sessions.chat import ChatLayout

_FIX = 'give {"messages": [{"role": ..., "content": ...}, ...]} or {"prompt": ..., "response": ...} on each line'


@dataclass(frozen=True)
class Example:
    """`responses`: (start, end) of each response in `token_ids`, in order; before the first there is at least one token."""

    token_ids: tuple[int, ...]
    responses: tuple[tuple[int, int], ...]

    @property
    def response_tokens(self) -> int:
        return sum(end - start for start, end in self.responses)


def stop_ids(base: Path, tokenizer) -> tuple[int, ...]:
    """Tokens at which the server ends an answer: the tokenizer's end of text, and generation_config.json's."""
    more = ()
    if (base / "generation_config.json").is_file():
        given = fingerprint.read_json(base, "generation_config.json").get("eos_token_id") or ()
        more = (given,) if isinstance(given, int) else tuple(given)
    return tuple(dict.fromkeys(token for token in (tokenizer.eos_token_id, *more) if token is not None))


def read(
    path: Path, tokenizer, stops: Sequence[int], max_tokens: int, *, field: str = "train"
) -> tuple[list[Example], int]:
    """(the examples in `path`, one per line, cut after `max_tokens`; how many responses were left out). Raises ConfigError
    naming a line that cannot be used, such as one with an answer that would not end in one of `stops`."""
    examples, left_out = [], 0
    for number, line in enumerate(_lines(path, field), 1):
        if not line.strip():
            continue
        try:
            example = _example(records.parse(line), tokenizer, stops)
        except (ValueError, InvalidInput) as error:
            said = error if isinstance(error, InvalidInput) else InvalidInput(str(error))
            where = f"{said.field}: " if said.field else ""
            raise ConfigError(f"{path}, line {number}: {where}{said.message}", field=field, fix=said.fix or _FIX) from None
        cut = _cut(example, max_tokens)
        left_out += len(example.responses) - (len(cut.responses) if cut else 0)
        examples += [cut] if cut else []
    if not examples:
        raise ConfigError(f"{path} has no response within {max_tokens} tokens", field=field, fix="raise max_tokens")
    return examples, left_out


def _lines(path: Path, field: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field=field, fix="give a file of JSON lines in UTF-8") from None


def _example(record: Chat | Text, tokenizer, stops: Sequence[int]) -> Example:
    if isinstance(record, Chat):
        return _of_chat(record, ChatLayout(tokenizer, [tool.for_template() for tool in record.tools]), stops)
    if not stops:
        raise ValueError("the base's tokenizer has no end-of-text token with which an answer could end")
    layout = ChatLayout(tokenizer)
    prompt, response = layout.ids(record.prompt), layout.ids(record.response)
    return Example((*prompt, *response, stops[0]), ((len(prompt), len(prompt) + len(response) + 1),))


def _of_chat(chat: Chat, layout: ChatLayout, stops: Sequence[int]) -> Example:
    """Lay a chat out turn by turn, as a session grows: what comes before an answer, the answer, and the token that ends it."""
    ids: list[int] = []
    responses, waiting, is_open = [], [], False
    for message in chat.messages:
        if message.role != "assistant":
            waiting.append(message.for_template())
            continue
        if not waiting:
            raise ValueError("an assistant message follows no other")
        ids += layout.appended(ids, is_open, waiting) if ids else layout.opening(waiting)
        start = len(ids)
        ids += layout.ids(layout.calling(message.for_template()) if message.tool_calls else message.content)
        end = layout.closing(ids)[:1]
        if not set(end) & set(stops):
            raise ValueError(f"the chat template ends an answer with token {end}, the server stops at {list(stops)}")
        ids += end
        if message.is_learnt:
            responses.append((start, len(ids)))
        waiting, is_open = [], True
    return Example(tuple(ids), tuple(responses))


def _cut(example: Example, max_tokens: int) -> Example | None:
    """The example with only the responses that fit, and what is before them; None if none fits."""
    fitting = tuple(span for span in example.responses if span[1] <= max_tokens)
    return Example(example.token_ids[: fitting[-1][1]], fitting) if fitting else None
