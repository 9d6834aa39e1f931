"""Signals that wait, and files that appear whole, whatever comes in between."""

import os
import signal
import threading
from pathlib import Path

import pytest

from penstock.errors import OutputError
from penstock.io import atomic
from penstock.io.atomic import appearing, write_whole
from penstock.io.interrupts import held_back


@pytest.fixture
def terminated():
    """SIGTERM raises SystemExit, as on the command line."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    yield leave
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_waits_for_the_end_of_the_block(terminated, number, raised):
    reached = []
    with pytest.raises(raised), held_back():
        signal.raise_signal(number)
        reached.append("the end")
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGTERM) is terminated


def test_a_signal_that_another_thread_takes_waits_too(terminated):
    reached = []
    with pytest.raises(SystemExit), held_back():
        thread = threading.Thread(target=signal.raise_signal, args=(signal.SIGTERM,))
        thread.start()
        thread.join()
        reached.append("the end")
    assert reached == ["the end"]


def test_blocks_within_blocks(terminated):
    reached = []
    with pytest.raises(SystemExit), held_back():
        with held_back():
            signal.raise_signal(signal.SIGTERM)
        reached.append("the outer end")
    assert reached == ["the outer end"]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with held_back():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_other_threads_nothing_changes(terminated):
    seen = []

    def look():
        with held_back():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [terminated]


@pytest.mark.parametrize("moment", ["tempfile.mkstemp", "os.fsync", "os.umask", "os.open"])
def test_no_signal_leaves_a_part_of_a_file(tmp_path, monkeypatch, terminated, moment):
    """Whether the file is there then or not, it is whole, and nothing lies beside it."""
    module, name = moment.split(".")
    where = getattr(atomic, module)
    plain = getattr(where, name)

    def interrupted(*arguments, **named):
        result = plain(*arguments, **named)
        monkeypatch.setattr(where, name, plain)
        signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(SystemExit):
        write_whole(tmp_path / "result", "all of it\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} in ({}, {"result": "all of it\n"})


def test_what_the_block_raises_comes_out_and_nothing_is_left(tmp_path):
    with pytest.raises(OSError, match="mine"), appearing(tmp_path / "result") as stream:
        stream.write("half")
        raise OSError("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OutputError, match="No such file") as caught:
        write_whole(tmp_path / "no" / "result", "")
    assert str(tmp_path / "no" / "result") in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        write_whole(Path(tmp_path / "result"), "")
