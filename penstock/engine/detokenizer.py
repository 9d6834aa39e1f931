"""Text of a completion while it grows, and the end of it: stop strings.

A token may be part of a character, and a piece of text may depend on the token before it. So the new text is the
difference between two decodings of a short window, taken only when it ends in a whole character; this is the way of
text-generation-inference and vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Detokenizer", "Tokenizer", "find_stop"]

WINDOW = 6
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of tokens."""


class Detokenizer:
    """Grows one completion's text token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt_ids[-WINDOW:])
        self._read = len(self._tokens)
        self._start = 0
        self.text = ""

    def append(self, token: int) -> str:
        """Add a token and return the text that it completes, perhaps none."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        if len(text) <= len(known) or text.endswith(REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        new = text[len(known) :]
        self.text += new
        return new

    def finish(self) -> str:
        """Return the whole text, with what is left of an unfinished character."""
        known = self._decode(self._tokens[self._start : self._read])
        self.text += self._decode(self._tokens[self._start :])[len(known) :]
        self._start, self._read = self._read, len(self._tokens)
        return self.text

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def find_stop(text: str, num_new: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Return where the earliest stop string begins, if one ends in the last `num_new` characters of `text`."""
    found = []
    for stop in stops:
        place = text.find(stop, max(len(text) - num_new - len(stop) + 1, 0))
        if place >= 0:
            found.append((place, stop))
    return min(found, default=None)
