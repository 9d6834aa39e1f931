"""The command line. Nothing here imports torch before a command runs."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import penstock
from penstock.cli import batch, bench, generate, pack, plan, profile, score
from penstock.errors import OutputError, PenstockError

__all__ = ["main"]

_MOMENT_SECONDS = 0.02


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 an error that is named on stderr, 2 wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    level = logging.DEBUG if options.verbose > 1 else logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(format="penstock: %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("penstock").setLevel(level)
    try:
        with _signals_end_cleanly():
            return _run(options)
    except PenstockError as error:
        print(f"penstock: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("penstock: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    """Run the command and see that what it printed has arrived."""
    if sys.stdout is None:
        raise OutputError("there is no standard output to print to", fix="Do not close it; redirect it to /dev/null.")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PenstockError:
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        raise OutputError("cannot write to standard output", got=error.strerror) from error
    return status


@contextmanager
def _signals_end_cleanly() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exit that runs every clean-up; Ctrl-C does so anyway.

    An exit that comes while a finalizer or another callback runs is lost: the interpreter can only report it. Then the
    signal comes again, a moment later.
    """
    main_thread = threading.main_thread()
    if threading.current_thread() is not main_thread:
        yield
        return

    received: list[int] = []
    again: list[threading.Timer] = []

    def leave(number: int, _: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    def look(lost: sys.UnraisableHookArgs) -> None:
        if (
            not issubclass(lost.exc_type, SystemExit | KeyboardInterrupt)
            or threading.current_thread() is not main_thread
        ):
            hook(lost)
            return
        number = received[-1] if lost.exc_type is SystemExit and received else signal.SIGINT
        again.append(threading.Timer(_MOMENT_SECONDS, signal.pthread_kill, (main_thread.ident, number)))
        again[-1].daemon = True
        again[-1].start()

    hook, sys.unraisablehook = sys.unraisablehook, look
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
    if received:  # some library has swallowed the exit
        raise SystemExit(128 + received[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock", description="Run language models far bigger than the GPU on one GPU.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"penstock {penstock.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate.add_to(commands)
    batch.add_to(commands)
    score.add_to(commands)
    bench.add_to(commands)
    pack.add_to(commands)
    plan.add_to(commands)
    profile.add_to(commands)
    for each in (parser, *commands.choices.values()):  # before or after the command's name
        default = 0 if each is parser else argparse.SUPPRESS
        each.add_argument(
            "-v", "--verbose", action="count", default=default, help="say more on stderr; twice for details"
        )
    return parser
