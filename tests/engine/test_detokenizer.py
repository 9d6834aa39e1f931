from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.detokenizer import Detokenizer, find_stop


class Bytes:
    """A byte-level tokenizer: token ids are bytes, and 256 is special."""

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@given(st.text(max_size=20), st.text(max_size=30))
def test_text_grows_to_the_whole_decoding_whatever_the_characters(prompt, text):
    detokenizer = Detokenizer(Bytes(), list(prompt.encode()))
    grown = "".join(detokenizer.append(token) for token in text.encode())
    assert detokenizer.text == grown
    assert detokenizer.finish() == text
    assert detokenizer.finish() == text


def test_special_tokens_have_no_text_and_cut_characters_show_at_the_end():
    detokenizer = Detokenizer(Bytes(), [])
    assert [detokenizer.append(token) for token in (*b"ab", 256, 0xE2, 0x82)] == ["a", "b", "", "", ""]
    assert detokenizer.finish() == "ab\N{REPLACEMENT CHARACTER}"


def test_stop_strings_are_found_where_they_begin_also_across_tokens():
    assert find_stop("hello world", 1, ["lo w", "world"]) == (6, "world")
    assert find_stop("hello wo", 3, ["lo w"]) == (3, "lo w")
    assert find_stop("stop at the start", 1, ["stop"]) is None
    assert find_stop("abab", 2, ["ab", "ba"]) == (1, "ba")
    assert find_stop("abc", 3, []) is None
