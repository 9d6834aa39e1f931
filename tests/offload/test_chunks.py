from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from penstock.io.files import SourceFile
from penstock.offload.chunks import plan_chunks
from penstock.offload.layout import Extent

FILES = [SourceFile(Path(f"/shard{n}"), 1 << 30, 1, n, 0) for n in range(2)]


@st.composite
def extents(draw):
    """Extents at any place of two files, in any order, that fill a buffer without holes."""
    result, destination = [], 0
    for _ in range(draw(st.integers(0, 12))):
        nbytes = draw(st.integers(1, 20_000))
        result.append(Extent(draw(st.sampled_from(FILES)), draw(st.integers(0, 300_000)), nbytes, destination))
        destination += nbytes
    return result


@given(extents(), st.integers(1, 8))
def test_every_byte_is_staged_once_and_copied_to_its_place(extents, pages):
    chunk_nbytes = pages * 4096
    chunks = plan_chunks(extents, chunk_nbytes=chunk_nbytes)
    arrived = {}
    for chunk in chunks:
        assert 0 < chunk.staging_nbytes <= chunk_nbytes
        staged = {}
        for read in chunk.reads:
            assert read.offset % 4096 == read.nbytes % 4096 == read.staging % 4096 == 0
            for byte in range(0, read.nbytes, 4096):
                assert read.staging + byte not in staged, "two reads into one page of staging"
                staged[read.staging + byte] = (read.file, read.offset + byte)
        for copy in chunk.copies:
            for byte in range(copy.nbytes) if copy.nbytes < 64 else (0, copy.nbytes // 2, copy.nbytes - 1):
                file, offset = staged[(copy.staging + byte) // 4096 * 4096]
                source = offset + (copy.staging + byte) % 4096
                assert copy.destination + byte not in arrived
                arrived[copy.destination + byte] = (file, source)
    assert sum(chunk.nbytes for chunk in chunks) == sum(extent.nbytes for extent in extents)
    for destination, (file, source) in arrived.items():
        extent = next(e for e in extents if e.destination <= destination < e.destination + e.nbytes)
        assert (file, source) == (extent.file, extent.source + destination - extent.destination)


def test_neighbours_on_disk_are_read_together():
    extents = [Extent(FILES[0], 8 + 1000 * n, 1000, 5000 * (9 - n)) for n in range(10)]
    (chunk,) = plan_chunks(extents, chunk_nbytes=1 << 20)
    assert len(chunk.reads) == 1
    assert len(chunk.copies) == 10


def test_nothing_to_read_is_no_chunk():
    assert plan_chunks([], chunk_nbytes=4096) == ()
