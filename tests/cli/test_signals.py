"""Signals end a command with its clean-ups, whatever was running when they came."""

import signal
import threading

import pytest

from penstock.cli import generate
from penstock.cli.main import main

SECONDS = 60


class Interrupted:
    """Its finalizer is running when the signal comes, so that what the handler raises is lost."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_an_exit_that_a_finalizer_swallows_comes_again(monkeypatch, capsys, number, status):
    cleaned = []

    def run(options):
        try:
            Interrupted(number)
            threading.Event().wait(SECONDS)  # ends at once when the signal comes again
        finally:
            cleaned.append(True)
        return 0

    monkeypatch.setattr(generate, "run", run)
    try:
        ended = main(["generate"])
    except SystemExit as leaving:
        ended = leaving.code
    assert ended == status
    assert cleaned == [True]


def test_what_else_finalizers_raise_is_reported_as_ever(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("mine")

    reported = []
    monkeypatch.setattr("sys.unraisablehook", lambda lost: reported.append(lost.exc_type))
    monkeypatch.setattr(generate, "run", lambda options: Broken() and 0)
    assert main(["generate"]) == 0
    assert reported == [ValueError]
