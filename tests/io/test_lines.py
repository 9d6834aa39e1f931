import hashlib
import io
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from penstock.io.lines import read_lines, survey


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")), max_size=12), st.booleans())
def test_lines_have_an_editors_numbers_and_all_bytes_are_hashed(lines, ended):
    data = b"\n".join(lines) + b"\n" * ended
    digest = hashlib.sha256()
    found = dict(read_lines(io.BytesIO(data), digest=digest, max_nbytes=10))
    assert digest.digest() == hashlib.sha256(data).digest()
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines) and not ended
        plain = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if len(line) + (not is_last) > 10:
            assert found.pop(number) is None
        elif plain.strip():
            assert found.pop(number) == plain.strip()
    assert not found


def test_a_line_without_end_takes_no_memory():
    class Endless(io.RawIOBase):
        left = 64 << 20

        def readable(self):
            return True

        def readinto(self, buffer):
            size = min(len(buffer), self.left)
            buffer[:size] = b"x" * size
            self.left -= size
            return size

    tracemalloc.start()
    assert list(read_lines(io.BufferedReader(Endless()), max_nbytes=1 << 20)) == [(1, None)]
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_survey_counts_lines_that_are_not_blank(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"\xef\xbb\xbf{}\r\n\n  \n[1]")
    found = survey(file)
    assert (found.num_lines, found.nbytes) == (2, 14)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
