"""Requests into sequences: text into tokens, and every check that needs no memory budget."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from penstock.engine.request import Request, ScoreRequest, is_tokens
from penstock.engine.sequence import Sequence
from penstock.errors import PromptTooLongError, RequestError

__all__ = ["Preparer"]


class Preparer:
    """Makes sequences for one model. `tokenizer` is transformers', or None where only token ids are taken."""

    def __init__(self, path: Path, *, tokenizer: Any, vocab_size: int, context_length: int | None) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length

    def __call__(self, request: Request | ScoreRequest) -> Sequence:
        """Return the sequence of a request. Raises RequestError, naming its number."""
        return self._completion(request) if isinstance(request, Request) else self._scoring(request)

    def _completion(self, request: Request) -> Sequence:
        text, ids = self._tokenize(request.number, request.prompt)
        if not ids:
            raise RequestError(f"prompt {request.number} is empty", wanted="at least one token", got=repr(text))
        self._check(request.number, ids, room_for=1)
        capacity = len(ids) + request.params.max_tokens
        if self._context_length is not None:
            capacity = min(capacity, self._context_length)
        return Sequence(request.number, text, ids, request.params, capacity)

    def _scoring(self, request: ScoreRequest) -> Sequence:
        """The last token is only a target: nothing comes after it, so it does not go through the model."""
        number = request.number
        text, context = self._tokenize(number, request.prompt)
        if request.continuation is None:
            ids, known = context, 1
        else:
            ids, known = self._join(number, text, context, request.continuation)
        if not known or len(ids) <= known:
            wanted = "at least one token to score, and one before it"
            fix = "Put the model's beginning-of-text token before it." if not known else None
            raise RequestError(f"text {number} is too short", wanted=wanted, got=f"{len(ids)} tokens", fix=fix)
        self._check(number, ids, room_for=0)
        return Sequence.to_score(number, text, ids, num_known=known)

    def _join(
        self, number: int, text: str | None, context: tuple[int, ...], continuation: Any
    ) -> tuple[tuple[int, ...], int]:
        """Return all tokens, and how many of them the context keeps.

        Text is tokenised as a whole, as it would be read; the tokens that differ from the context's own, as one that
        spans the seam does, belong to the continuation.
        """
        if text is None and is_tokens(continuation):
            return (*context, *continuation), len(context)
        if text is None or not isinstance(continuation, str):
            wanted = "a continuation of the prompt's kind, text or token ids"
            raise RequestError(f"continuation {number} does not fit", wanted=wanted, got=repr(continuation)[:80])
        _, whole = self._tokenize(number, text + continuation)
        same = next((n for n, pair in enumerate(zip(context, whole, strict=False)) if pair[0] != pair[1]), len(context))
        return whole, min(same, len(whole))

    def _check(self, number: int, ids: Items[int], *, room_for: int) -> None:
        limit = self._context_length
        if limit is not None and len(ids) + room_for > limit:
            raise PromptTooLongError(
                f"prompt {number} is longer than the model's context",
                wanted=f"fewer than {limit + 1 - room_for} tokens",
                got=f"{len(ids)} tokens",
                fix="Shorten the prompt.",
            )
        if bad := [token for token in ids if not 0 <= token < self._vocab_size]:
            wanted = f"ids below {self._vocab_size}"
            raise RequestError(f"prompt {number} has tokens that the model does not know", wanted=wanted, got=bad[:5])

    def _tokenize(self, number: int, prompt: Any) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), tuple(prompt["prompt_token_ids"])
            prompt = prompt.get("prompt")
        if is_tokens(prompt):
            return None, tuple(prompt)
        if not isinstance(prompt, str):
            wanted = 'text, token ids, or a mapping with "prompt" or "prompt_token_ids"'
            raise RequestError(f"prompt {number} is not a prompt", wanted=wanted, got=repr(prompt))
        if self._tokenizer is None:
            raise RequestError(
                f"prompt {number} is text, and the model has no tokenizer",
                file=self._path,
                fix="Give token ids, or put the tokenizer's files beside the model.",
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompt {number} is not text", wanted="Unicode", got=error.reason) from error
        return prompt, tuple(self._tokenizer(prompt).input_ids)
