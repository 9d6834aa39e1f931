"""A file of requests, worked off into a file of results: streamed in, journaled, resumable.

A result is acknowledged when it is in the journal beside the output, and on the disk. Nothing acknowledged is lost or
done again, whatever ends the process; the same command goes on. At the end the results are put in the order of their
lines, so that the output's bytes do not depend on when anything finished, and the journal goes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

from penstock.cli.codec import asked_codec
from penstock.cli.options import open_llm, tiers_of
from penstock.cli.output import ProgressLine
from penstock.engine.request import Request, ScoreRequest
from penstock.errors import (
    BudgetError,
    ClosedError,
    ConfigError,
    JournalError,
    OutputError,
    PenstockError,
    PromptFileError,
    PromptTooLongError,
    RequestError,
)
from penstock.io.atomic import appearing, naming
from penstock.io.journal import Journal
from penstock.io.lines import MAX_LINE_NBYTES, Survey, read_lines, survey

if TYPE_CHECKING:
    from penstock.engine.forecast import Length
    from penstock.engine.llm import LLM
    from penstock.engine.report import Progress
    from penstock.offload.cost import Machine

__all__ = ["LengthOf", "Line", "Parse", "Stream", "add_files", "run_job"]

_SAMPLE_LINES = 1024
COMMIT_SECONDS = 0.1
"""Passes that are shorter than this share a commit."""

_CODES: dict[type[PenstockError], str] = {
    PromptTooLongError: "context_length_exceeded",
    BudgetError: "insufficient_memory",
    PromptFileError: "invalid_line",
}
_NO_ERROR = b'"error": null}'

logger = logging.getLogger("penstock.cli")


@dataclass(frozen=True, slots=True)
class Line:
    """A line that was understood: what to ask of the model, and how its output becomes a record."""

    request: Request | ScoreRequest
    record: Callable[[Any], dict[str, Any]]


Parse = Callable[[int, dict[str, Any], "LLM"], Line]
"""Makes a request of a line's number and fields; raises RequestError or ConfigError."""

LengthOf = Callable[[dict[str, Any]], "Length"]
"""Guesses the length of a line's request from its fields; raises RequestError or ConfigError."""

Stream = Callable[..., Iterator[Any]]
"""`LLM.stream` or `LLM.stream_scores` of a model."""


def add_files(parser: Any) -> None:
    """Add input, output and what goes with them to a command."""
    parser.add_argument("input", metavar="IN.jsonl", help="one request per line; - for stdin, which cannot be resumed")
    parser.add_argument("output", metavar="OUT.jsonl", help="one result per line, in the order of the input")
    parser.add_argument("--model", help="directory of a Hugging Face checkpoint (default: the bundled model)")
    parser.add_argument("--overwrite", action="store_true", help="replace the output where there is one")
    parser.add_argument("--json", action="store_true", help="print the run's summary on stdout as one line of JSON")


def run_job(
    options: argparse.Namespace,
    parse: Parse,
    stream_of: Callable[[LLM], Stream],
    length_of: LengthOf,
    *,
    parameters: Mapping[str, Any],
) -> int:
    """Run a command's job from its first line or where it stopped. Returns the exit status.

    `parameters` are the options that results depend on: a journal that was written with others is refused.
    """
    tiers = tiers_of(options)
    target = Path(options.output)
    part = target.with_name(f"{target.name}.part")
    known = _survey(options.input)
    if target.is_dir():
        raise OutputError("the output is a directory", file=target, wanted="a file")
    going_on = part.exists()
    if going_on and known is None:
        fix = "Remove the journal, which holds what was done, or name another output."
        raise JournalError("a job that reads stdin cannot be resumed", file=part, fix=fix)
    exists = OutputError("the output exists", file=target, fix="Name another, or add --overwrite.")
    if target.exists() and not (options.overwrite or going_on):
        raise exists
    with Journal.open(part, _identity(options, known, parameters)) as journal:
        if target.exists() and not (options.overwrite or journal.finished):
            raise exists
        job = _Job(journal, parse, known, source=options.input)
        if known is None:
            logger.warning("stdin cannot be read twice: a run that is interrupted cannot be resumed")
        elif going_on:
            _say(f"going on: {len(journal)} of {known.num_lines} lines are done")
        with _Stop() as stop:
            summary = None
            if known is None or len(journal) < known.num_lines:
                expects = [] if known is None else _expected(options.input, known.num_lines - len(journal), length_of)
                with open_llm(options, tiers, job.progress, expects=expects) as llm:
                    summary = None if stop.number else job.run(llm, stream_of(llm), stop)
            if stop.number:
                _say(f"stopped with {len(journal)} {_of(known)}lines done; {_hint(known, part)}")
                return 128 + stop.number
            _finish(journal, target, summary, as_json=options.json, resumed=going_on)
    return 0


def _survey(source: str) -> Survey | None:
    """Read the input once: how many lines it has, and which bytes. None for stdin."""
    if source == "-":
        return None
    try:
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise PromptFileError("not a file", file=source, fix="Name a file, or - for stdin.")
        found = survey(Path(source))
    except OSError as error:
        raise PromptFileError("cannot be read", file=source, got=error.strerror) from error
    if not found.num_lines:
        raise PromptFileError("no requests in this file", file=source, wanted="at least one line", got="none")
    return found


def _expected(source: str, num_lines: int, length_of: LengthOf) -> list[Length]:
    """Guess how long the requests of so many lines are; the first lines stand for all."""
    lengths = []
    with Path(source).open("rb") as stream:
        for _, raw in islice(read_lines(stream), _SAMPLE_LINES):
            with suppress(RequestError, ConfigError):  # a bad line gets its error when its turn comes
                lengths.append(length_of(_fields(raw)))
    return (lengths * -(-num_lines // len(lengths)))[:num_lines] if lengths else []


def _identity(options: argparse.Namespace, known: Survey | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a job to go on: command, input, model, dtypes, codec, parameters. Memory may differ."""
    codec = asked_codec(options)
    return {
        "command": options.command,
        "input": None if known is None else known.sha256,
        "model": _fingerprint(options.model),
        "dtype": options.dtype,
        "kv_dtype": options.kv_dtype,
        **({} if options.activation_dtype == "auto" else {"activation_dtype": options.activation_dtype}),
        **({} if codec is None else {"codec": {**asdict(codec), "exclude": list(codec.exclude)}}),
        "parameters": {name: value for name, value in parameters.items() if value is not None},
    }


def _fingerprint(model: str | None) -> str:
    """Return a hash of the model's files: of what small ones hold, and the names, sizes and times of large ones."""
    if model is None:
        return "bundled"
    digest = hashlib.sha256()
    try:
        for file in sorted(Path(model).iterdir()):
            status = file.stat()
            if file.suffix in {".json", ".jinja", ".txt", ".model"}:
                digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
            elif file.suffix == ".safetensors":
                digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    except OSError:
        return "none"  # loading it will say what is wrong
    return digest.hexdigest()


class _Job:
    """Lines on their way from the input to the journal."""

    def __init__(self, journal: Journal, parse: Parse, known: Survey | None, *, source: str) -> None:
        self.progress = ProgressLine()
        self._journal = journal
        self._parse = parse
        self._known = known
        self._source = source
        self._records: dict[int, tuple[str | None, Callable[[Any], dict[str, Any]]]] = {}
        self._ids: set[int] = set()
        self._before = len(journal)
        self._committed = time.monotonic()

    def run(self, llm: LLM, stream: Stream, stop: _Stop) -> dict[str, Any] | None:
        """Work until every line is journaled, or `stop` is set. Returns the run's summary."""

        def on_pass(state: Progress) -> None:
            if stop.number or time.monotonic() - self._committed > COMMIT_SECONDS:
                self._journal.commit()
                self._committed = time.monotonic()
            self.progress.show(self._describe(state, llm.machine))
            if stop.number:
                raise _StoppedError

        def on_error(request: Request | ScoreRequest, error: PenstockError) -> None:
            self._fail(request.number, self._records.pop(request.number)[0], error)

        with nullcontext(sys.stdin.buffer) if self._source == "-" else Path(self._source).open("rb") as lines:
            try:
                for output in stream(self._requests(lines, llm), on_pass=on_pass, on_error=on_error):
                    number = int(output.request_id)
                    custom_id, record = self._records.pop(number)
                    self._journal.append(number, _payload(number, custom_id, record(output)))
            except _StoppedError:
                pass
            except PenstockError:
                with suppress(ClosedError):  # it is closed when it was the journal that failed
                    self._journal.commit()
                raise
            finally:
                self.progress.clear()
        self._journal.commit()
        if llm.last_run is None:
            return None
        if not stop.number:
            _say(f"{llm.last_run.plan.explain()}\n{llm.last_run.explain()}")
        return llm.last_run.as_dict()

    def _requests(self, stream: BinaryIO, llm: LLM) -> Iterator[Request | ScoreRequest]:
        """Yield the requests of lines that are not done; a bad line goes to the journal."""
        digest = hashlib.sha256()
        for number, raw in read_lines(stream, digest=digest):
            custom_id = None
            try:
                fields = _fields(raw)
                found = fields.get("custom_id")
                custom_id = found if isinstance(found, str) else None
                self._check_unique(fields)
                if number in self._journal:
                    continue
                line = self._parse(number, fields, llm)
            except (RequestError, ConfigError) as error:
                if number not in self._journal:
                    self._fail(number, custom_id, error)
                continue
            self._records[number] = custom_id, line.record
            yield line.request
        if self._known is not None and digest.hexdigest() != self._known.sha256:
            raise PromptFileError("the input has changed while it was read", file=self._source, fix="Begin again.")

    def _check_unique(self, fields: Mapping[str, Any]) -> None:
        """Refuse an id that an earlier line had. Eight bytes of a hash stand for each, since there may be millions."""
        custom_id = fields.get("custom_id")
        if custom_id is None:
            return
        if not isinstance(custom_id, str):
            raise RequestError('"custom_id"', wanted="text", got=repr(custom_id)[:80])
        short = int.from_bytes(hashlib.blake2b(custom_id.encode("utf-8", "replace"), digest_size=8).digest())
        if short in self._ids:
            raise RequestError("an earlier line has this custom_id", got=repr(custom_id)[:80])
        self._ids.add(short)

    def _fail(self, number: int, custom_id: str | None, error: PenstockError) -> None:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), "invalid_request")
        plain = PenstockError(error.what, wanted=error.wanted, got=error.got, fix=error.fix)  # without the model's path
        told = {"code": code, "message": f"line {number}: {plain}", "line": number}
        self._journal.append(number, _payload(number, custom_id, {"response": None}, error=told))

    def _describe(self, state: Progress, machine: Machine | None) -> str:
        seconds, done = max(state.seconds, 1e-9), len(self._journal)
        new = done - self._before
        total = left = ""
        if self._known is not None:
            total = f"/{self._known.num_lines}"
            left = f", {_duration((self._known.num_lines - done) * seconds / new)} left" if new else ""
        peaks = (machine.nvme_to_host, machine.host_to_device) if machine else (None, None)
        read, copied = state.traffic.disk_bytes / seconds, state.traffic.device_bytes / seconds
        return (
            f"{done}{total} lines, {(state.generated_tokens or state.prompt_tokens) / seconds:.1f} tokens/s, "
            f"nvme → host {_rate(read, peaks[0])}, host → device {_rate(copied, peaks[1])}{left}"
        )


def _rate(rate: float, peak: float | None) -> str:
    """Show bytes per second, and the share of what was measured of the link, if it was."""
    return f"{rate / 1e9:.2f} GB/s" + (f" ({rate / peak:.0%})" if peak else "")


def _fields(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        raise PromptFileError("too long", wanted=f"at most {MAX_LINE_NBYTES} bytes")
    try:
        fields = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise PromptFileError("not UTF-8", got=f"byte 0x{raw[error.start]:02x} at {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise PromptFileError("not JSON", got=str(error)) from error
    if not isinstance(fields, dict):
        raise PromptFileError("not a request", wanted="a JSON object", got=type(fields).__name__)
    return fields


def _payload(number: int, custom_id: str | None, record: dict[str, Any], *, error: Any = None) -> bytes:
    whole = {"id": f"batch_req_{number}", "custom_id": custom_id, **record, "error": error}
    return json.dumps(whole).encode()


def _finish(journal: Journal, target: Path, summary: dict[str, Any] | None, *, as_json: bool, resumed: bool) -> None:
    """Put the output in place; the journal, which holds the same, goes last."""
    journal.finish()
    errors = 0
    try:
        sibling = target.with_name(f".{journal.path.name}")  # ours alone, for the journal is locked
        with appearing(target, sibling=sibling) as stream, naming(target):
            for payload in journal.in_order():
                errors += not payload.endswith(_NO_ERROR)
                stream.write(payload.decode() + "\n")
    except OutputError as error:
        fix = f"Every result is in {journal.path.name}: make room and run the same command again."
        raise OutputError(error.what, file=target, got=error.got, fix=fix) from error
    count = len(journal)
    journal.remove()
    _say(f"{target}: {count - errors} results and {errors} errors of {count} lines")
    if as_json:
        print(json.dumps((summary or {}) | {"lines": count, "errors": errors, "resumed": resumed}))


class _StoppedError(Exception):
    """A pass has ended, and a signal asked for no other."""


class _Stop:
    """Inside, the first SIGINT, SIGTERM or SIGHUP sets `number` and nothing else; the next one ends the process."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()
        os.write(2, b"\npenstock: ending after this pass; once more to end now\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _of(known: Survey | None) -> str:
    return "" if known is None else f"of {known.num_lines} "


def _hint(known: Survey | None, part: Path) -> str:
    return f"their results are in {part}" if known is None else "run the same command again to go on"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
