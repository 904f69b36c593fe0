"""Of a response that a stop text ended, a session keeps the tokens whose text was shown, and the rest of the text anew."""

import pytest

from prefillshare.router.sessions.seen_response import seen_response


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("texts", "shown", "kept"),
    [
        (["ab", "cd", "ef"], "abcd", [0, 1]),  # at a token's border
        (["ab", "cd", "ef"], "abc", [0, ord("c")]),  # inside a token
        (["ab", "cd", "ef"], "a", [ord("a")]),  # inside the first one
        (["ab", "cd"], "", []),  # nothing was shown
        (["", "", "ab"], "", []),
        (["ab", "", "", "é"], "ab", [0]),  # tokens of a character that was not shown
        (["ab", "", "", "é!"], "abé", [0, ord("é")]),  # ... of which all but the end was shown
        (["ab", "", "cd", "", ""], "abcd", [0, 1, 2]),  # one without text stays where text follows
        (["ab", "cd"], "abcd", [0, 1]),  # all was shown
        ([], "", []),
    ],
)
def test_kept_is_what_was_shown(texts, shown, kept):
    lengths = [len("".join(texts[: number + 1])) for number in range(len(texts))]
    assert seen_response(range(len(texts)), lengths, shown, encode) == kept
