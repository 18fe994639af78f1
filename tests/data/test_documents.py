"""Documents: digests, deduplication, cutting."""

from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_jax.data.documents import (
    cut,
    cut_documents,
    deduplicate,
    digest_of,
    document,
)

LINES = st.lists(st.text("ab \n", max_size=30).map(lambda line: line + "\n"))


@given(LINES, st.integers(1, 40))
@example(["aaa\n", "\n", "bbbb\n", "cccccccc\n"], 10)
def test_cutting_loses_nothing_and_keeps_the_limit(lines, limit):
    pieces = list(cut(lines, limit))
    assert "".join(pieces) == "".join(lines)
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_cuts_come_at_blank_lines_where_there_are_some():
    lines = ["aaaa\n", "\n", "bbbb\n", "cccc\n"]
    assert list(cut(lines, 12)) == ["aaaa\n\n", "bbbb\ncccc\n"]
    assert list(cut(["aaaa\n", "bbbb\n", "cccc\n"], 12)) == ["aaaa\nbbbb\n", "cccc\n"]
    assert list(cut(["x" * 25], 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_pieces_keep_the_digest_of_the_whole():
    whole = document("d", "one\n\n" * 10, "name")
    pieces = list(cut_documents([whole], 20))
    assert len(pieces) > 1
    assert {piece.digest for piece in pieces} == {whole.digest}
    assert "".join(piece.text for piece in pieces) == whole.text


def test_digests_see_words_and_not_blanks():
    assert digest_of("a  b\n") == digest_of(" a\tb")
    assert digest_of("a b") != digest_of("ab")


def test_duplicates_and_empty_texts_go():
    texts = ["a b", "c", "a\nb ", " \n", "c", "C"]
    kept = deduplicate(document("d", text, "") for text in texts)
    assert [item.text for item in kept] == ["a b", "c", "C"]
