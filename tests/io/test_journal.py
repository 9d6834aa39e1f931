"""Journals after every kind of end."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.errors import ClosedError, JournalError, OutputError
from penstock.io.journal import Journal

JOB = {"input": "abc", "parameters": {"seed": 1}}

payloads = st.binary(max_size=40).map(lambda data: data.replace(b"\n", b" "))


def write(path, entries, *, commit=True):
    journal = Journal.open(path, JOB)
    for number, payload in entries:
        journal.append(number, payload)
    if commit:
        journal.commit()
    return journal


def reopened(path):
    with Journal.open(path, JOB) as journal:
        return {number for number in range(1, 200) if number in journal}, list(journal.in_order())


def test_entries_come_back_in_order_and_once(tmp_path):
    path = tmp_path / "out.part"
    with write(path, [(3, b"three"), (1, b"one")]) as journal:
        assert (3 in journal, 2 in journal, 10**6 in journal, len(journal)) == (True, False, False, 2)
    with Journal.open(path, JOB) as journal:
        assert (3 in journal, 2 in journal, len(journal), journal.finished) == (True, False, 2, False)
        journal.append(2, b"two")
        journal.finish()
        assert list(journal.in_order()) == [b"one", b"two", b"three"]
    with Journal.open(path, JOB) as journal:
        assert journal.finished
        journal.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ClosedError):
        journal.commit()


def test_an_empty_journal_has_nothing_to_give(tmp_path):
    with Journal.open(tmp_path / "out.part", JOB) as journal:
        journal.commit()
        journal.finish()
        assert list(journal.in_order()) == []


def test_a_journal_without_entries_leaves_no_file(tmp_path):
    path = tmp_path / "out.part"
    with Journal.open(path, JOB):
        assert path.exists()
    assert not path.exists()


def test_one_that_names_the_job_of_more_than_its_entries_is_kept(tmp_path):
    path = tmp_path / "out.part"
    Journal.open(path, JOB, keep_empty=True).close()
    assert reopened(path) == (set(), [])


def test_what_was_not_committed_is_not_there(tmp_path):
    path = tmp_path / "out.part"
    write(path, [(1, b"one")]).close()
    write(path, [(2, b"two")], commit=False).close()
    assert reopened(path) == ({1}, [b"one"])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.lists(payloads, min_size=1, max_size=5), last=payloads)
def test_a_line_torn_at_any_byte_is_cut_off_and_nothing_else(tmp_path, kept, last):
    path = tmp_path / "out.part"
    path.unlink(missing_ok=True)
    write(path, list(enumerate(kept, start=1))).close()
    whole = path.stat().st_size
    number = len(kept) + 1
    write(path, [(number, last)]).close()
    data = path.read_bytes()
    for end in range(whole, len(data)):
        path.write_bytes(data[:end])
        assert reopened(path) == (set(range(1, number)), kept)
        assert path.stat().st_size == whole
    path.write_bytes(data)
    assert reopened(path) == (set(range(1, number + 1)), [*kept, last])


TAILS = [b"2 00000000 two\n1 00000000 x\n", b"9" * 5000 + b" 00000000 x\n"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.one_of(st.binary(max_size=200), st.just(bytes(4096)), st.sampled_from(TAILS)))
def test_whatever_a_crash_leaves_behind_the_last_commit_is_cut_off(tmp_path, tail):
    path = tmp_path / "out.part"
    path.unlink(missing_ok=True)
    write(path, [(1, b"one"), (7, b"seven")]).close()
    data = path.read_bytes()
    path.write_bytes(data + tail)
    assert reopened(path) == ({1, 7}, [b"one", b"seven"])
    assert path.read_bytes() == data


def test_a_journal_that_died_while_it_was_made_begins_again(tmp_path):
    path = tmp_path / "out.part"
    with write(path, []):
        header = path.read_bytes()
    for end in range(0, len(header), 9):
        for tail in (b"", bytes(100)):
            path.write_bytes(header[:end] + tail)
            with Journal.open(path, JOB) as journal:
                assert len(journal) == 0
                assert path.read_bytes() == header


def test_a_byte_that_flips_is_seen(tmp_path):
    path = tmp_path / "out.part"
    write(path, [(1, b"one"), (2, b"two"), (3, b"three")]).close()
    data = path.read_bytes()
    place = data.index(b"two")
    path.write_bytes(data[:place] + b"T" + data[place + 1 :])
    assert reopened(path) == ({1}, [b"one"]), "what follows is done again"


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({**JOB, "input": "other"}, 'another input: wanted "abc", got "other"'),
        ({"input": "abc", "parameters": {}}, 'another parameters: wanted {"seed": 1}, got {}'),
        ({"input": "abc"}, "another parameters"),
        ({**JOB, "more": 1}, "another more: wanted null, got 1"),
    ],
)
def test_jobs_are_never_mixed(tmp_path, job, message):
    path = tmp_path / "out.part"
    write(path, [(1, b"one")]).close()
    before = path.read_bytes()
    with pytest.raises(JournalError) as caught:
        Journal.open(path, job)
    assert message in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [b"some text\n", b"{}", b"0 00000000 {}\n", b"\x00\x01\n", b"9 " * 50])
def test_other_files_are_left_alone(tmp_path, data):
    path = tmp_path / "out.part"
    path.write_bytes(data)
    with pytest.raises(JournalError, match="not a journal of this program"):
        Journal.open(path, JOB)
    assert path.read_bytes() == data


def test_an_entry_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "out.part"
    write(path, [(1, b"one")]).close()
    data = path.read_bytes()
    path.write_bytes(data + data.splitlines(keepends=True)[-1])
    with pytest.raises(JournalError, match="entry 1 is there twice"):
        Journal.open(path, JOB)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "out.part"
    with write(path, [(1, b"one")]) as journal:
        with pytest.raises(JournalError, match="another process is running this job"):
            Journal.open(path, JOB)
        journal.append(2, b"two")
        journal.commit()
    assert reopened(path) == ({1, 2}, [b"one", b"two"])


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OutputError, match="cannot open the journal"):
        Journal.open(tmp_path / "none" / "out.part", JOB)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="folder"):
        Journal.open(tmp_path / "folder", JOB)


def test_descriptors_are_given_back(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    path = tmp_path / "out.part"
    with write(path, [(1, b"one")]) as journal:
        list(journal.in_order())
    with pytest.raises(JournalError):
        Journal.open(path, {})
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_entries_take_little_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "out.part"
    count = 20_000
    tracemalloc.start()
    with Journal.open(path, JOB) as journal:
        for number in range(count, 0, -1):
            journal.append(number, b"x" * 30)
        journal.commit()
    with Journal.open(path, JOB) as journal:
        assert len(journal) == count
        assert sum(1 for _ in journal.in_order()) == count
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 << 20, "buffers, and not what they hold in all"


def test_the_first_line_says_what_the_file_is(tmp_path):
    path = tmp_path / "out.part"
    with write(path, []):
        (header,) = path.read_text().splitlines()
    assert json.loads(header.split(" ", 2)[2]) == {"format": "penstock journal", "version": 1, "job": JOB}
