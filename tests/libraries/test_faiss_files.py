"""faiss with its recent features, and without them."""

from types import SimpleNamespace

import pytest

from openchatkit.libraries import faiss_files


def test_the_limit_holds_while_a_file_is_opened_and_is_restored():
    limits = [100]
    faiss = SimpleNamespace(
        get_deserialization_vector_byte_limit=lambda: limits[-1],
        set_deserialization_vector_byte_limit=limits.append,
    )

    def open_damaged():
        with faiss_files.byte_limit(faiss, 7):
            assert limits == [100, 7]
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        open_damaged()
    assert limits == [100, 7, 100]


def test_a_faiss_without_limits_opens_files_too():
    entered = False
    with faiss_files.byte_limit(SimpleNamespace(), 7):
        entered = True
    assert entered


def test_prefetching_of_lists_is_turned_off():
    lists = SimpleNamespace(prefetch_nthread=32)
    faiss_files.disable_prefetch(lists)
    assert lists.prefetch_nthread == 0
    plain = SimpleNamespace()
    faiss_files.disable_prefetch(plain)
    assert vars(plain) == {}
