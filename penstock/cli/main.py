"""The command line. Nothing here imports torch before a command runs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import penstock
from penstock.cli import generate
from penstock.errors import PenstockError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 an error that is named on stderr, 2 wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    level = logging.DEBUG if options.verbose > 1 else logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(format="penstock: %(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("penstock").setLevel(level)
    try:
        status: int = options.run(options)
    except PenstockError as error:
        print(f"penstock: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("penstock: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="penstock", description="Run language models far bigger than the GPU on one GPU.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"penstock {penstock.__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more on stderr; twice for details")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate.add_to(commands)
    return parser
