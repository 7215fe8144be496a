"""`--mask-before-token`: the two stores of GPT-NeoX, against a plain search in each document."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.formats.label_store import find_difference
from openchatkit.formats.token_store import TokenStore
from openchatkit.tools.preprocess import command as module
from openchatkit.tools.preprocess.command import main


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    return ended.value.code


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def mask(tokens: list[int], ids: list[int]) -> list[int]:
    """Labels by the words of GPT-NeoX's command: nothing up to the first such ids and including them."""
    for place in range(len(tokens) - len(ids) + 1):
        if tokens[place : place + len(ids)] == ids:
            return [-100] * (place + len(ids)) + tokens[place + len(ids) :]
    return tokens


@pytest.mark.parametrize("given", ["a", "ab", "aa", "aba", "b\0", "abbababb"])
@pytest.mark.parametrize("end", [[], ["--append-eod"]])
def test_labels(tmp_path: Path, given: str, end: list[str]) -> None:
    """Also where the ids end one document and begin the next, overlap themselves, or hold the end of a document."""
    rng = random.Random(1)
    texts = ["".join(rng.choices("ab", k=rng.randint(0, 9))) for _ in range(200)]
    data = write(tmp_path / "a.jsonl", texts)
    ids = [ord(character) for character in given]
    flags = ["--mask-before-token", ",".join(map(str, ids)), "--tokenizer-type", "CharLevelTokenizer", *end]
    assert run("--input", data, *flags, "--output-prefix", tmp_path / "o") == 0
    documents = [[*map(ord, text), *([0] if end else [])] for text in texts if text]
    found = [TokenStore(tmp_path / f"o_{key}_document") for key in ("text", "label")]
    assert [store.tokens.dtype for store in found] == [np.dtype("<i4")] * 2
    assert [found[0].document(number).tolist() for number in range(found[0].documents)] == documents
    labels = [found[1].document(number).tolist() for number in range(found[1].documents)]
    assert labels == [mask(document, ids) for document in documents]
    assert find_difference(*found, lambda _: None) is None


def test_training_on_them(tiny_tokenizer: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ["ab:cd", "x:yz"])
    kind = ["--tokenizer-type", "CharLevelTokenizer", "--append-eod"]
    assert run("--input", data, *kind, "--mask-before-token", ord(":"), "--output-prefix", tmp_path / "o") == 0
    options = DataOptions(tiny_tokenizer, seq_length=6, packing="none", loss_on="responses", data_cache=tmp_path / "c")
    batch = build_dataset(f"{tmp_path}/o_text_document[labels={tmp_path}/o_label_document]", options).batch(0, 2)
    found = sorted(bytes(label for label in row if label != IGNORE) for row in batch.labels.tolist())
    assert found == [b"cd\0", b"yz\0"]


def test_documents_without_the_ids_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write(tmp_path / "a.jsonl", ["ab", "cd", "ce"])
    flags = ["--tokenizer-type", "CharLevelTokenizer", "--mask-before-token", ord("c"), "--overwrite"]
    assert run("--input", data, *flags, "--output-prefix", tmp_path / "o") == 0
    assert "1 of 3 documents do not hold 99 and are trained on whole" in capsys.readouterr().err
    write(data, ["cd", "ce"])
    assert run("--input", data, *flags, "--output-prefix", tmp_path / "o") == 0
    assert "do not hold" not in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "a.jsonl", [f"{number}:{number * 7}" for number in range(60)])
    flags = ["--input", data, "--tokenizer-type", "CharLevelTokenizer", "--mask-before-token", ord(":"), "--workers", 1]
    assert run(*flags, "--output-prefix", tmp_path / "whole") == 0
    monkeypatch.setattr(module, "PACE", module.Pace(batch_bytes=50, save_tokens=1))
    encode, calls = module.fields.encode, []

    def stop(*arguments: object) -> object:
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as stopped:
        stopped.setattr(module.fields, "encode", stop)
        assert run(*flags, "--output-prefix", tmp_path / "o") == 130
    assert run(*flags, "--output-prefix", tmp_path / "o") == 0
    for name in ("text_document.bin", "text_document.idx", "label_document.bin", "label_document.idx"):
        assert (tmp_path / f"o_{name}").read_bytes() == (tmp_path / f"whole_{name}").read_bytes()
    assert not (tmp_path / ".o.partial").exists()
