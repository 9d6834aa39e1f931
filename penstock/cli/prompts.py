"""Prompts from files: one per line of text, or JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import PromptFileError, RequestError

__all__ = ["PromptLine", "parse_prompt", "read_prompts"]


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt: text, token ids, or messages for the chat template; `fields` are its own sampling fields."""

    prompt: Any
    messages: list[dict[str, str]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    where: str = ""


def read_prompts(source: str) -> list[PromptLine]:
    """Read a file of prompts, or stdin for "-".

    A `.jsonl` file, and stdin whose first character is "{", holds one JSON object per line: "prompt",
    "prompt_token_ids" or "messages", and sampling fields. Any other file holds one prompt per line. Empty lines are
    skipped. Raises PromptFileError with the line's number.
    """
    text = _read(source)
    is_json = source.endswith(".jsonl") or (source == "-" and text.lstrip().startswith("{"))
    parse = _from_json if is_json else _from_text
    prompts = list(parse(text, source))
    if not prompts:
        raise PromptFileError("no prompts in this file", file=source, wanted="at least one line", got="none")
    return prompts


def _read(source: str) -> str:
    try:
        return sys.stdin.buffer.read().decode() if source == "-" else Path(source).read_bytes().decode()
    except OSError as error:
        raise PromptFileError("cannot read the prompts", file=source, got=error.strerror) from error
    except UnicodeDecodeError as error:
        got = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise PromptFileError("the prompts are not text", file=source, wanted="UTF-8", got=got) from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _from_text(text: str, source: str) -> Iterator[PromptLine]:
    for number, line in _lines(text):
        yield PromptLine(line, where=f"{source}:{number}")


def _from_json(text: str, source: str) -> Iterator[PromptLine]:
    for number, line in _lines(text):
        where = f"{source}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptFileError(f"line {number} is not JSON", file=source, got=str(error)) from error
        if not isinstance(fields, dict):
            raise PromptFileError(f"line {number}", file=source, wanted="a JSON object", got=type(fields).__name__)
        yield _prompt(fields, number, source, where)


def _prompt(fields: dict[str, Any], number: int, source: str, where: str) -> PromptLine:
    try:
        prompt, messages = parse_prompt(fields)
    except RequestError as error:
        what = f"line {number}: {error.what}" if error.what else f"line {number}"
        raise PromptFileError(what, file=source, wanted=error.wanted, got=error.got) from error
    return PromptLine(prompt, messages, fields, where)


def parse_prompt(fields: dict[str, Any]) -> tuple[Any, list[dict[str, str]] | None]:
    """Take the prompt, or else the messages, out of a line's fields and return both. Raises RequestError."""
    kinds = [kind for kind in ("prompt", "prompt_token_ids", "messages") if kind in fields]
    if len(kinds) != 1:
        wanted = 'one of "prompt", "prompt_token_ids" and "messages"'
        raise RequestError("", wanted=wanted, got=", ".join(sorted(fields)) or "nothing")
    value = fields.pop(kinds[0])
    expected: dict[str, tuple[str, bool]] = {
        "prompt": ("text", isinstance(value, str)),
        "prompt_token_ids": (
            "a list of integers",
            isinstance(value, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in value),
        ),
        "messages": (
            'a list of {"role", "content"} objects',
            isinstance(value, list)
            and bool(value)
            and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value),
        ),
    }
    wanted, holds = expected[kinds[0]]
    if not holds:
        raise RequestError(f'"{kinds[0]}"', wanted=wanted, got=json.dumps(value)[:80])
    if kinds[0] == "messages":
        return None, value
    return value, None
