"""`data.samples.order` and `arrays`: orders and running sums against numpy's, and the files that keep them."""

import errno
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from openchatkit.data.samples import arrays, order
from openchatkit.data.samples.arrays import Arrays
from openchatkit.data.samples.order import RunningSums, shuffle_numbers
from openchatkit.errors import UserError

SEED = [7, 0, 3]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "CHUNK", 128)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logger.add(found.append, level=logging.WARNING, format="{message}")
    yield found
    logger.remove(handler)


def plain(length: int) -> list[int]:
    values = np.arange(length)
    np.random.RandomState(np.random.MT19937(np.random.SeedSequence(SEED))).shuffle(values)
    return values.tolist()


@pytest.mark.parametrize("in_memory", [0, 999, 1000])
def test_orders_are_the_same_in_memory_and_in_files(tmp_path: Path, in_memory: int) -> None:
    kept = Arrays(tmp_path, 1000, in_memory=in_memory)
    for _ in range(2):
        values = shuffle_numbers(kept, "order", 3, 1000, seed=SEED)
        assert (values.dtype, values.tolist()) == (np.uint32, plain(1000))
    files = [path.name for path in tmp_path.iterdir() if path.suffix == ".npy"]
    assert files == ([] if in_memory == 1000 else ["order-epoch-3.npy"])
    if files:
        assert np.load(tmp_path / files[0], mmap_mode="r").tolist() == plain(1000)
        assert not values.flags.writeable


def test_orders_do_not_change_between_releases(tmp_path: Path) -> None:
    """Runs that were started years ago go on by them, whatever numpy has become."""
    values = shuffle_numbers(Arrays(tmp_path, 20), "order", 3, 20, seed=SEED)
    assert values.tolist() == [12, 15, 14, 3, 7, 17, 18, 10, 1, 2, 0, 16, 5, 4, 19, 13, 9, 11, 8, 6]


def test_a_file_is_read_and_not_made_again(tmp_path: Path) -> None:
    shuffle_numbers(Arrays(tmp_path, 300, in_memory=0), "order", 3, 300, seed=SEED)
    values = shuffle_numbers(Arrays(tmp_path, 300, in_memory=0), "order", 3, 300, seed=[1])
    assert values.tolist() == plain(300)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "longer", "bit", "checksum", "header", "other length", "other type"]
)
def test_a_damaged_file_is_built_again(tmp_path: Path, messages: list[str], damage: str) -> None:
    kept = Arrays(tmp_path, 300, in_memory=0)
    shuffle_numbers(kept, "order", 3, 300, seed=SEED)
    path = tmp_path / "order-epoch-3.npy"
    whole = path.read_bytes()
    if damage == "other length":
        shuffle_numbers(kept, "order", 3, 299, seed=SEED)
    elif damage == "other type":
        kept.make("order", 3, 300, np.int64, [np.arange(300)])
    else:
        at = {"bit": len(whole) - 500, "checksum": len(whole) - 1, "header": 20}.get(damage, 0)
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        path.write_bytes({"cut": whole[:-9], "empty": b"", "longer": whole + b"1"}.get(damage, flipped))
    messages.clear()
    assert shuffle_numbers(kept, "order", 3, 300, seed=SEED).tolist() == plain(300)
    assert path.read_bytes() == whole
    assert messages == [f"{path} is damaged: building it again\n"]


def test_only_two_epochs_are_kept(tmp_path: Path) -> None:
    kept = Arrays(tmp_path, 300, in_memory=0)
    first = shuffle_numbers(kept, "order", 0, 300, seed=SEED)
    for epoch in (0, 1, 2, 9, 3):
        for name in ("order", "rows-128"):
            kept.make(name, epoch, 300, np.int64, [np.full(300, epoch)])
        kept.make("whole-128", None, 300, np.int64, [np.zeros(300)])
        left = {path.name for path in tmp_path.glob("*.npy")}
        epochs = {2: (1, 2), 9: (9,), 3: (9, 3)}.get(epoch, range(epoch + 1))
        assert left == {"whole-128.npy"} | {f"{name}-epoch-{n}.npy" for name in ("order", "rows-128") for n in epochs}
    assert first.tolist() == plain(300), "what is deleted is still read by those who have it"


def test_a_failed_build_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Arrays(tmp_path / "orders", 300, in_memory=0)

    def pieces() -> Iterator[np.ndarray]:
        yield np.arange(128)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        UserError, match=r"cannot write the order of the data to .*orders .*: the disk is full: make room"
    ):
        kept.make("order", 0, 300, np.int64, pieces())

    def alter(_: np.ndarray) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.make("order", 0, 300, np.int64, [np.arange(300)], alter)
    assert list((tmp_path / "orders").iterdir()) == []
    assert kept.make("order", 0, 300, np.int64, [np.arange(300)]).tolist() == list(range(300))


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "orders").touch()
    with pytest.raises(
        UserError, match=r"the order of the data to .*orders.x \(--data-cache\): part of the path is a file"
    ):
        Arrays(tmp_path / "orders" / "x", 300, in_memory=0).make("order", 0, 300, np.int64, [np.arange(300)])


BUILD = """
import sys, time
from pathlib import Path
from openchatkit.data.samples.arrays import Arrays
from openchatkit.data.samples.order import shuffle_numbers
kept = Arrays(Path(sys.argv[1]), 200_000, in_memory=0)
print(flush=True)
sys.stdin.readline()
for epoch in range(3):
    values = shuffle_numbers(kept, "order", epoch, 200_000, seed=[7, 0, 3])
    print(values[:5].tolist(), int(values[::7].sum(dtype="int64")))
"""


def test_processes_that_build_at_once(tmp_path: Path, quick_python: Path) -> None:
    processes = [
        subprocess.Popen(
            [quick_python, "-c", BUILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        process.stdout.readline()  # it has imported everything
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    values = np.array(plain(200_000))
    assert outputs[0] == outputs[1] == f"{values[:5].tolist()} {values[::7].sum()}\n" * 3
    # Who comes late to an epoch may find it tidied away, and builds it again.
    names = {path.name for path in tmp_path.iterdir()}
    assert {"order-epoch-1.npy", "order-epoch-2.npy"} <= names <= {f"order-epoch-{epoch}.npy" for epoch in range(3)}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5) | st.just(0), min_size=1, max_size=400), st.data())
def test_running_sums(sizes: list[int], data: st.DataObject) -> None:
    if not sum(sizes):
        sizes[len(sizes) // 2] = 1
    values = np.array(sizes, np.int64)
    sums = RunningSums(Arrays(Path("unused"), 0), "sums", 0, len(sizes), lambda low, high: values[low:high])
    ends = np.cumsum(values)
    for _ in range(5):
        position = data.draw(st.integers(0, int(ends[-1]) - 1))
        count = data.draw(st.integers(1, int(ends[-1]) + 5))
        first, found, offset = sums.span(position, count)
        assert first == np.searchsorted(ends, position, side="right")
        assert offset == position - (ends[first] - values[first])
        last = int(np.searchsorted(ends, position + count, side="left"))
        assert found.tolist() == sizes[first : last + 1]


def test_large_numbers_of_things() -> None:
    assert order.number_type(1 << 31) == np.uint32
    assert order.number_type(1 << 32) == np.int64
    assert arrays.CHUNK % 64 == 0
