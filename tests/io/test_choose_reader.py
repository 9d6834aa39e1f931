import json
import logging
import subprocess
import sys

import pytest

from penstock.errors import ConfigError, FileChangedError, ReadError
from penstock.io import choose
from penstock.io.choose import open_reader
from penstock.io.direct import direct_refusal
from penstock.io.libaio import LibaioReader
from penstock.io.reader import Read
from penstock.io.threads import ThreadsReader

MIB = 1 << 20


@pytest.fixture
def sample(make_file):
    file, _ = make_file(3 * MIB + 77)
    return file


@pytest.fixture
def direct_sample(sample, memory):
    if direct_refusal(sample, memory.view) is not None:
        pytest.skip("the file system of temporary files has no O_DIRECT")
    return sample


def refuse(*_args, **_keywords):
    raise ReadError("scripted refusal")


def test_auto_prefers_libaio_and_says_why(direct_sample, memory, caplog):
    with caplog.at_level(logging.INFO, "penstock.io"):
        reader, choice = open_reader("auto", direct_sample, memory.view)
    with reader:
        assert isinstance(reader, LibaioReader)
        assert (choice.name, choice.direct, choice.rejected) == ("libaio", True, ())
        assert choice.reason in caplog.text
        assert json.loads(json.dumps(choice.as_dict()))["name"] == "libaio"


@pytest.mark.parametrize("name", ["libaio", "threads", "aiofiles"])
def test_a_reader_that_was_asked_for(direct_sample, memory, name):
    reader, choice = open_reader(name, direct_sample, memory.view)
    with reader:
        assert (reader.name, choice.name, choice.direct) == (name, name, True)
        assert "asked for" in choice.reason
        reader.wait(reader.submit([Read(direct_sample, 0, memory.view[: 4 * MIB])]))
        assert memory.view[: direct_sample.nbytes] == direct_sample.path.read_bytes()


@pytest.mark.parametrize("memory_bytes", [4096, 12288, 2 * MIB])
@pytest.mark.parametrize("file_bytes", [1, 4096, 5000])
def test_small_samples_and_small_memory(make_file, memory, memory_bytes, file_bytes):
    file, _ = make_file(file_bytes)
    reader, _ = open_reader("auto", file, memory.view[:memory_bytes])
    reader.close()


def test_the_next_one_is_tried(direct_sample, memory, monkeypatch):
    monkeypatch.setattr(choose, "LibaioReader", refuse)
    reader, choice = open_reader("auto", direct_sample, memory.view)
    with reader:
        assert isinstance(reader, ThreadsReader)
        assert choice.rejected == (("libaio", "scripted refusal"),)
    monkeypatch.setattr(choose, "ThreadsReader", refuse)
    reader, choice = open_reader("auto", direct_sample, memory.view)
    with reader:
        assert choice.name == "aiofiles"
        assert [name for name, _ in choice.rejected] == ["libaio", "threads"]


def test_none_works(sample, memory, monkeypatch):
    for name in ("LibaioReader", "ThreadsReader", "AiofilesReader"):
        monkeypatch.setattr(choose, name, refuse)
    with pytest.raises(ReadError, match="scripted refusal"):
        open_reader("auto", sample, memory.view)


def test_no_silent_fallback_for_a_reader_that_was_asked_for(sample, memory, monkeypatch):
    monkeypatch.setattr(choose, "LibaioReader", refuse)
    with pytest.raises(ConfigError, match="'libaio' does not work here"):
        open_reader("libaio", sample, memory.view)


def test_a_reader_that_delivers_other_bytes(direct_sample, memory, monkeypatch):
    class Liar(ThreadsReader):
        def submit(self, reads):
            return super().submit([])

    monkeypatch.setattr(choose, "ThreadsReader", Liar)
    with pytest.raises(ConfigError, match="other bytes than a plain read"):
        open_reader("threads", direct_sample, memory.view)


def test_tmpfs_is_read_through_the_page_cache_by_threads(make_file, memory, shared_memory_directory):
    file, _ = make_file(MIB, shared_memory_directory)
    reader, choice = open_reader("auto", file, memory.view)
    with reader:
        assert (choice.name, choice.direct) == ("threads", False)
        assert "tmpfs" in choice.reason
        assert choice.rejected[0][0] == "libaio"
        assert reader.statistics().buffered_reads == 1
    with pytest.raises(ConfigError, match="tmpfs"):
        open_reader("libaio", file, memory.view)


def test_refusals_of_o_direct(direct_sample, memory, monkeypatch):
    from penstock.io import direct

    monkeypatch.setattr(direct, "_alignment_refusal", lambda _: None)
    assert direct_refusal(direct_sample, memory.view) is None
    assert "EINVAL" in str(direct_refusal(direct_sample, memory.view[1:MIB]))
    counts = iter([0, 3])
    monkeypatch.setattr(direct, "_resident", lambda *_: next(counts))
    assert "through the page cache" in str(direct_refusal(direct_sample, memory.view))


def test_a_sample_that_changed(direct_sample, memory):
    direct_sample.path.write_bytes(b"x" * MIB)
    with pytest.raises(ReadError, match="not the one whose header was read"):
        open_reader("auto", direct_sample, memory.view)
    with pytest.raises(FileChangedError):
        ThreadsReader().submit([Read(direct_sample, 0, memory.view)])


def test_no_torch_is_imported():
    modules = "checkpoint choose fake limits memory"
    code = "import sys\n" + "".join(f"import penstock.io.{name}\n" for name in modules.split())
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
