"""Whatever a table is cut into, joined it is the same table."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibug2 import streams

WORDS = st.lists(st.one_of(st.none(), st.text(max_size=20)), max_size=200)


@given(words=WORDS)
def test_a_table_survives_the_way(words):
    table = pa.table({"word": pa.array(words, pa.string()), "row": pa.array(range(len(words)), pa.int64())})
    assert streams.open_pieces(streams.table_pieces(table)).read_all().equals(table)


@given(pieces=st.lists(st.binary(max_size=40), max_size=20), sizes=st.lists(st.integers(0, 50), max_size=20))
def test_a_piece_file_reads_as_one_file(pieces, sizes):
    whole = b"".join(pieces)
    file = streams.PieceFile(iter(pieces))
    at = 0
    for size in sizes:
        assert file.read(size) == whole[at : at + size]
        at += size
    assert file.read() == whole[at:]


def test_pieces_are_at_most_one_mebibyte_even_for_large_rows():
    table = pa.table({"text": ["x" * 3_000_000, "y" * 10, "z" * 1_048_576]})
    pieces = list(streams.table_pieces(table))
    assert max(map(len, pieces)) <= 1 << 20
    assert streams.open_pieces(iter(pieces)).read_all().equals(table)


def test_pieces_come_before_the_table_is_written_whole():
    table = pa.table({"n": pa.array(range(2_000_000), pa.int64())})
    first = next(streams.table_pieces(table))
    assert len(first) == 1 << 20


def test_an_error_of_the_connection_is_not_hidden_by_arrow():
    def broken():
        yield next(streams.table_pieces(pa.table({"n": [1]})))[:20]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        streams.open_pieces(broken()).read_all()
