import errno
from pathlib import Path

import pytest

from penstock.errors import ClosedError, FileChangedError, ReadError
from penstock.io.fake import FakeReader, Fault, fake_file
from penstock.io.reader import Read

CONTENT = bytes(range(256)) * 64
FILE = fake_file("layer", CONTENT)
POISON = b"\xa5"


def make(**script):
    return FakeReader({FILE.path: CONTENT}, **script)


def read(offset=0, nbytes=4096):
    return Read(FILE, offset, memoryview(bytearray(nbytes)))


@pytest.mark.parametrize("completion", ["at once", "when waited for", "newest first"])
def test_completion_is_scripted(completion):
    with make(completion=completion) as reader:
        first, second = read(), read(8192)
        tickets = [reader.submit([first]), reader.submit([second])]
        early = first.memory == CONTENT[:4096]
        assert early == (completion == "at once")
        if not early:
            assert first.memory == POISON * 4096
        reader.wait(tickets[0])
        assert first.memory == CONTENT[:4096]
        assert (second.memory == CONTENT[8192:12288]) == (completion != "when waited for")
        reader.wait(tickets[1])
        assert second.memory == CONTENT[8192:12288]
        assert reader.completed == ([1, 0] if completion == "newest first" else [0, 1])


def test_virtual_time_and_statistics():
    with make(latency_seconds=1.0, bytes_per_second=4096.0) as reader:
        reader.wait(reader.submit([read(), read(4096)]))
        statistics = reader.statistics()
        assert (statistics.reads, statistics.bytes_read, statistics.busy_seconds) == (2, 8192, 3.0)


@pytest.mark.parametrize(
    ("fault", "error", "number"),
    [
        (Fault(), ReadError, errno.EIO),
        (Fault("errno", errno.ENODEV), ReadError, errno.ENODEV),
        (Fault("short"), ReadError, errno.EIO),
        (Fault("changed"), FileChangedError, None),
    ],
)
def test_faults_hit_the_nth_read_and_belong_to_its_ticket(fault, error, number):
    with make(faults={1: fault}) as reader:
        good, bad = reader.submit([read()]), reader.submit([read(), read()])
        with pytest.raises(error) as caught:
            reader.wait(bad)
        assert getattr(caught.value, "errno", None) == number
        reader.wait(good)
        assert reader.statistics().reads == 2


def test_the_end_of_the_file():
    with make() as reader:
        last = read(12288, 8192)
        reader.wait(reader.submit([last]))
        assert last.memory == CONTENT[12288:] + POISON * 4096


def test_closed():
    reader = make()
    outstanding = read()
    reader.submit([outstanding])
    reader.close()
    reader.close()
    assert outstanding.memory == CONTENT[:4096]
    for use in (reader.statistics, lambda: reader.submit([]), lambda: reader.wait(0)):
        with pytest.raises(ClosedError):
            use()


def test_real_files(make_file):
    file, content = make_file(5000)
    with FakeReader() as reader:
        whole = Read(file, 0, memoryview(bytearray(8192)))
        reader.wait(reader.submit([whole]))
        assert whole.memory[:5000] == content
        Path(file.path).write_bytes(b"other")
        with pytest.raises(FileChangedError):
            reader.submit([whole])
