"""`data.stores.workers`, by tokenising: they end with their parent, and leave its script and its Ctrl-C alone."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from forkserver import context

from openchatkit.data.records.raw_row import Mark, RawRow
from openchatkit.data.stores.tokenise import tokenise_all
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import Interrupted


def rows(texts: Iterable[str]) -> Iterator[RawRow]:
    for number, text in enumerate(texts, 1):
        yield RawRow(number, json.dumps({"text": text}).encode(), Mark(number))


def test_a_killed_worker_is_an_error(tiny_tokenizer: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer)
    parts = tokenise_all(rows(map(str, range(10**6))), tokenizer, separator="end-of-text", batch_bytes=1, processes=2)
    next(parts)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(Interrupted, match=r"killed, most likely for lack of memory: .* continues where it stopped"):
        list(parts)


SCRIPT = """
import sys, time
from openchatkit.data.stores.tokenise import tokenise_all
from openchatkit.data.records.raw_row import Mark, RawRow
from openchatkit.data.tokenizer import Tokenizer
rows = (RawRow(n, b'{"text": "%d"}' % n, Mark(n)) for n in range(1, 100_000))
parts = tokenise_all(rows, Tokenizer(sys.argv[1]), separator="end-of-text", processes=2)
try:
    print(next(parts)[1].sizes[:2].tolist(), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
    print(1 + sum(1 for _ in parts) > 2)
except KeyboardInterrupt:
    print("interrupted", flush=True)
finally:
    parts.close()
"""


@pytest.mark.parametrize("way", ["file", *(pytest.param(way, marks=pytest.mark.long) for way in ("command", "stdin"))])
def test_workers_do_not_run_the_main_script(tiny_tokenizer: Path, tmp_path: Path, way: str) -> None:
    """Its module must not run again in the workers."""
    (tmp_path / "script.py").write_text(SCRIPT)
    start = {"file": [str(tmp_path / "script.py")], "command": ["-c", SCRIPT], "stdin": ["-"]}[way]
    command = [sys.executable, *start, str(tiny_tokenizer), "go"]
    result = subprocess.run(command, input=SCRIPT if way == "stdin" else "", capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("[2, 2]\nTrue\n", 0), result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tiny_tokenizer: Path, number: int) -> None:
    """Ctrl-C, which a terminal sends to the whole group, says nothing of workers; a kill leaves none running."""
    command = [sys.executable, "-c", SCRIPT, str(tiny_tokenizer), "wait"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as parent:
        assert parent.stdout.readline() == "[2, 2]\n"
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)
            assert parent.stdout.readline() == "interrupted\n"
        else:
            parent.kill()
        # The pipes are closed once the last of the processes has ended.
        output, errors = parent.communicate(timeout=60)
    # When the parent is killed, Python's resource tracker says that it clears up what was left.
    assert (output, errors if number == signal.SIGINT else "") == ("", "")
    assert "Traceback" not in errors


def test_a_daemonic_process_starts_no_workers(tiny_tokenizer: Path) -> None:
    results = context.Queue()
    child = context.Process(target=tokenise_in_child, args=(tiny_tokenizer, results), daemon=True)
    child.start()
    assert results.get(timeout=60) == 2
    child.join()


def tokenise_in_child(folder: Path, results: object) -> None:
    parts = tokenise_all(rows(["one", "two"]), Tokenizer(folder), separator="end-of-text", processes=2)
    results.put(sum(len(part.sizes) for _, part in parts))


def test_workers_import_neither_torch_nor_transformers() -> None:
    code = """
import sys
import openchatkit.data.stores.tokenise, openchatkit.data.stores.workers
print(sorted({"torch", "transformers", "datasets", "pyarrow", "pandas"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr
