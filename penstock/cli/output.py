"""Results to a file or to stdout, and progress to a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from penstock.errors import OutputError
from penstock.io.atomic import appearing, naming

if TYPE_CHECKING:
    from penstock.engine.outputs import RequestOutput

__all__ = ["ProgressLine", "ResultFile", "check_output", "completion_record", "result_file"]


def check_output(path: str | None) -> None:
    """Raise OutputError, before any work is done, for a file that cannot be written."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise OutputError("cannot be written", file=path, wanted="a file in a directory that may be written to")


class ResultFile:
    """One result per call of `write`, as JSON lines or, in a `.txt` file, as text."""

    def __init__(self, stream: TextIO, path: str) -> None:
        self._stream = stream
        self._path = path
        self.is_text = path.endswith(".txt")

    def write(self, record: dict[str, Any]) -> None:
        """Write one record; a text file gets the completed text alone. Raises OutputError, as for a full disk."""
        line = f"{record['prompt'] or ''}{record['text']}" if self.is_text else json.dumps(record)
        with naming(self._path):
            self._stream.write(line.rstrip("\n") + "\n")


@contextmanager
def result_file(path: str) -> Iterator[ResultFile]:
    """Open a file of results that appears under its name only when all of it is on disk.

    Until then it is a hidden sibling, which is removed when anything fails. Raises OutputError before any work is done
    when the directory cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError("the output is a directory", file=path, wanted="a file")
    with appearing(target) as stream:
        yield ResultFile(stream, path)


TERMINAL_SECONDS, LOG_SECONDS = 0.1, 10.0


class ProgressLine:
    """A line that is written over where stderr is a terminal; in a log now and then a line, with the seconds so far."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._on_terminal = self._stream.isatty()
        self._began = time.monotonic()
        self._next = 0.0 if self._on_terminal else self._began + LOG_SECONDS

    def show(self, text: str) -> None:
        """Show `text`, at most ten times a second on a terminal and every ten seconds in a log."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (TERMINAL_SECONDS if self._on_terminal else LOG_SECONDS)
        self._stream.write(f"\r\x1b[K{text}" if self._on_terminal else f"[{now - self._began:.0f} s] {text}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Take the line away from a terminal."""
        if self._on_terminal and self._next:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def completion_record(output: RequestOutput) -> dict[str, Any]:
    """Return a completion as results have it, in files and on stdout."""
    completion = output.outputs[0]
    record: dict[str, Any] = {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_tokens": len(output.prompt_token_ids),
    }
    if completion.logprobs is not None:
        record["logprobs"] = [
            {str(token): {"logprob": entry.logprob, "rank": entry.rank} for token, entry in position.items()}
            for position in completion.logprobs
        ]
    return record
