"""`data/prefetch.py`: the next result is made while this one is used, and all else is as if it were not."""

import gc
import subprocess
import threading

import pytest
import torch

from openchatkit.data.prefetch import Prefetcher, make_thread

CPU = torch.device("cpu")
LONG = 60.0  # seconds; nothing waits so long unless it is wrong


class Squares:
    """Makes squares and notes in what order and by which threads; 13 is an error."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.done = {number: threading.Event() for number in range(20)}

    def __call__(self, number: int) -> int:
        self.made.append(number)
        self.threads.add(threading.current_thread())
        try:
            if number == 13:
                raise OSError("13 cannot be read")
            return number**2
        finally:
            self.done[number].set()


def test_the_next_result_is_made_before_it_is_asked_for_and_no_other():
    squares = Squares()
    prefetcher = Prefetcher(squares, make_thread(CPU))
    for number in range(5):
        assert prefetcher.take(number, following=number + 1 if number < 4 else None) == number**2
        assert number == 4 or squares.done[number + 1].wait(LONG)
        assert squares.made == list(range(min(number + 2, 5)))
    assert len(squares.threads) == 1
    assert threading.current_thread() not in squares.threads


def test_an_error_is_raised_where_its_result_is_asked_for():
    squares = Squares()
    prefetcher = Prefetcher(squares, make_thread(CPU))
    assert prefetcher.take(12, following=13) == 144
    assert squares.done[13].wait(LONG)
    with pytest.raises(OSError, match="13 cannot be read"):
        prefetcher.take(13, following=14)
    with pytest.raises(OSError, match="13 cannot be read"):
        prefetcher.take(13, following=14)
    assert prefetcher.take(14, following=None) == 196


def test_another_result_than_the_expected_one_is_made_when_it_is_asked_for():
    squares = Squares()
    prefetcher = Prefetcher(squares, make_thread(CPU))
    assert prefetcher.take(0, following=13) == 0
    assert prefetcher.take(7, following=8) == 49
    assert prefetcher.take(8, following=None) == 64
    assert [number for number in squares.made if number != 13] == [0, 7, 8]


def test_prefetchers_of_one_thread_never_run_at_the_same_time():
    running = threading.Lock()

    def make(number: int) -> bool:
        alone = running.acquire(blocking=False)
        threading.Event().wait(0.01)
        if alone:
            running.release()
        return alone

    thread = make_thread(CPU)
    prefetchers = [Prefetcher(make, thread) for _ in range(2)]
    assert all(prefetcher.take(number, following=number + 1) for number in range(3) for prefetcher in prefetchers)


def test_the_thread_ends_with_its_prefetchers():
    squares = Squares()
    prefetcher = Prefetcher(squares, make_thread(CPU))
    prefetcher.take(0, following=1)
    [thread] = squares.threads
    del prefetcher
    gc.collect()
    thread.join(LONG)
    assert not thread.is_alive()


@pytest.mark.parametrize("end", ["raise SystemExit(75)", "raise KeyboardInterrupt"])
def test_a_process_that_leaves_with_a_result_to_come_ends(end, quick_python):
    program = (
        "import time, torch\n"
        "from openchatkit.data.prefetch import Prefetcher, make_thread\n"
        "prefetcher = Prefetcher(lambda number: time.sleep(0.2 * number), make_thread(torch.device('cpu')))\n"
        f"prefetcher.take(0, following=1)\n{end}\n"
    )
    ended = subprocess.run([quick_python, "-c", program], timeout=LONG, capture_output=True, check=False)
    assert ended.returncode == (75 if "75" in end else -2)
