"""A pinned object as a file: every read returns the same bytes as from a file in memory."""

import io

from hypothesis import given, settings
from hypothesis import strategies as st

from blocksight.storage.stores.windowed_file import WindowedFile
from tests.storage.memory import MemoryStore

STEPS = st.tuples(st.sampled_from([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END]), st.integers(0, 24), st.integers(0, 24))


@settings(max_examples=150)
@given(st.binary(max_size=20), st.integers(1, 8), st.lists(STEPS, max_size=6))
def test_a_file_in_windows_reads_as_one_in_memory(data, window_bytes, steps):
    store = MemoryStore()
    store.put("x", data)
    ours, plain = WindowedFile(store, store.head("x"), window_bytes), io.BytesIO(data)
    for whence, offset, size in steps:
        away = -min(offset, len(data)) if whence == io.SEEK_END else offset
        assert ours.seek(away, whence) == plain.seek(away, whence)
        assert ours.read(size) == plain.read(size)
        assert ours.tell() == plain.tell()


def test_a_window_serves_small_reads_and_a_large_read_passes_it_by():
    store = MemoryStore()
    store.put("x", bytes(range(10)))
    file = WindowedFile(store, store.head("x"), window_bytes=4)
    assert [file.read_at(0, 2), file.read_at(2, 2), file.read_at(3, 2)] == [b"\x00\x01", b"\x02\x03", b"\x03\x04"]
    assert (file.window, file.window_start) == (bytes(range(3, 7)), 3)
    assert file.read_at(1, 6) == bytes(range(1, 7))
    assert file.read_at(8, 6) == b"\x08\x09"
    assert file.read_at(10, 1) == b""


def test_a_file_fills_a_buffer_as_far_as_it_reaches():
    store = MemoryStore()
    store.put("x", b"abcde")
    file, buffer = WindowedFile(store, store.head("x"), window_bytes=4), bytearray(b"-" * 4)
    assert (file.readinto(buffer), bytes(buffer)) == (4, b"abcd")
    assert (file.readinto(buffer), bytes(buffer)) == (1, b"ebcd")
