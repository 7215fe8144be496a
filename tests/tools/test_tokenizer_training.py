"""`tools.tokenizer_training`: decoding gives texts back, the folder loads, and too little data is an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.paths import ROOT
from openchatkit.tools import tokenizer_training
from openchatkit.tools.tokenizer_training import RecordTexts, bytes_per_token, input_files, main, train

TEXTS = [f"<human>: What does box.part{n} do?\n<bot>: Return part {n} of the box.\n" for n in range(250)]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    return ended.value.code


@pytest.fixture(scope="module")
def trained() -> Backend:
    return train(TEXTS, 300)


@pytest.fixture(scope="module")
def folded() -> Backend:
    return train(TEXTS, 300, normalizer="nfkc", add_prefix_space=True)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_every_text_back(trained: Backend, text: str) -> None:
    trained.encode_special_tokens = True
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_gpt_neox_settings_do_not_give_texts_back(folded: Backend) -> None:
    assert folded.decode(folded.encode("ﬁve").ids) == " five"
    assert folded.encode("Return").ids == folded.encode(" Return").ids


def test_no_character_is_lost_as_gpt_neox_loses_it(folded: Backend) -> None:
    """It trains without an alphabet: what the data lacks has no token."""
    theirs = Backend(models.BPE())
    theirs.normalizer, theirs.decoder = normalizers.NFKC(), decoders.ByteLevel()
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<|endoftext|>", "<|padding|>"]
    theirs.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    assert theirs.get_vocab() != folded.get_vocab()
    assert theirs.decode(theirs.encode("box é 猫 part").ids) == " box   part"
    assert folded.decode(folded.encode("box é 猫 part").ids) == " box é 猫 part"


def test_special_tokens_are_gpt_neox_20bs(trained: Backend) -> None:
    assert [trained.token_to_id(token) for token in ("<|endoftext|>", "<|padding|>")] == [0, 1]
    assert sorted(trained.get_vocab().values()) == list(range(300))


def test_the_folder_works_wherever_a_tokenizer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "tokenizer"
    assert run("--input", write(tmp_path / "a.jsonl"), "--save-dir", folder, "--vocab-size", 300) == 0
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.vocab_size, ours.end_of_text, ours.padding) == (300, 0, 1)
    assert (len(theirs), theirs.eos_token_id, theirs.pad_token_id) == (300, 0, 1)
    assert ours.encode([TEXTS[3]]) == [theirs.encode(TEXTS[3], add_special_tokens=False)]
    text = "He said : it 's 1 , no ?"
    assert theirs.decode(theirs.encode(text)) == text
    said = capsys.readouterr().err
    assert "300 tokens, trained on 248 records" in said
    held_out = RecordTexts([tmp_path / "a.jsonl"])
    assert list(held_out)
    assert "".join(held_out.held_out) == TEXTS[99] + TEXTS[199]
    figure = bytes_per_token(Backend.from_file(str(folder / "tokenizer.json")), held_out.held_out)
    assert f"{figure:.2f} bytes a token in records that were held out" in said
    assert f"the tokenizer is in {folder}" in said


def test_bytes_per_token_counts_utf8(trained: Backend) -> None:
    assert bytes_per_token(trained, ["äöü"]) == 1.0
    assert bytes_per_token(trained, TEXTS) > 2


def test_a_chat_is_read_segment_by_segment(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}) + "\n"
    )
    assert list(RecordTexts([tmp_path / "a.jsonl"])) == ["<human>: Hi\n<bot>:", " Ho\n"]


def test_gpt_neox_flags(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS[:150])
    write(tmp_path / "b.jsonl", TEXTS[150:])
    (tmp_path / "notes.md").touch()
    file = tmp_path / "out" / "neox.json"
    flags = ["--tokenizer_type", "BPE", "--vocab_size", 290, "--gpt-neox"]
    assert run("--json_input_dir", tmp_path, "--tokenizer_output_path", file, *flags) == 0
    assert [path.name for path in file.parent.iterdir()] == ["neox.json"]
    whole = json.loads(file.read_text())
    assert whole["normalizer"] == {"type": "NFKC"}
    assert whole["pre_tokenizer"]["add_prefix_space"] is True
    assert Backend.from_file(str(file)).get_vocab_size() == 290


def test_files_globs_and_a_limit(tmp_path: Path) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        write(tmp_path / name, TEXTS[:5])
    files = input_files([str(tmp_path / "a*.jsonl"), str(tmp_path / "a1.jsonl")])
    assert [path.name for path in files] == ["a1.jsonl", "a2.jsonl"]
    texts = RecordTexts(files, records_per_file=2)
    assert "".join(texts) == "".join(TEXTS[:2]) * 2
    assert texts.records == 4


def test_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl")
    path.write_text("{broken\n" + path.read_text())
    flags = ["--input", path, "--save-dir", tmp_path / "out", "--vocab-size", 300]
    assert run(*flags) == 2
    said = capsys.readouterr().err
    assert f"error: {path}:1: not JSON" in said
    assert "mend or remove it, or pass --bad-rows quarantine" in said
    assert run(*flags, "--bad-rows", "quarantine") == 0
    assert f"left out 1 rows that cannot be used, beginning with {path}:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab-size", 257], "--vocab-size 257: expected at least 258"),
        (["--vocab-size", 5000], "tokens only; pass that or more data"),
        (["--input", "{tmp}/none*.jsonl"], "none*.jsonl: no such file"),
        (["--save-dir", "{tmp}/taken"], "taken holds a tokenizer already: name another place, or pass --overwrite"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[object], message: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "tokenizer.json").touch()
    given = {"--input": write(tmp_path / "a.jsonl"), "--save-dir": tmp_path / "new", "--vocab-size": 300}
    given |= {flags[0]: str(flags[1]).format(tmp=tmp_path)}
    assert run(*[argument for pair in given.items() for argument in pair]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save-dir", "{tmp}/file"], "file cannot be written: {tmp}/file is not a folder that can be written to"),
        (["--save-dir", "{tmp}/file/a/b"], "b cannot be written: {tmp}/file is not a folder that can be written to"),
        (["--tokenizer-output-path", "{tmp}/file/a.json"], "cannot be written: {tmp}/file is not a folder"),
        (["--tokenizer-output-path", "{tmp}"], "--tokenizer-output-path {tmp} is a folder: name a file in it"),
        (["--save-dir", "/proc/tokenizer"], "/proc/tokenizer cannot be written: "),
    ],
)
def test_places_that_cannot_be_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    given = ["--input", write(tmp_path / "a.jsonl"), "--vocab-size", 300, "--overwrite"]
    assert run(*given, *[flag.format(tmp=tmp_path) for flag in flags]) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err


def test_a_folder_without_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no files of records there"):
        input_files([], tmp_path)


def test_training_a_tokenizer_does_not_import_torch() -> None:
    code = f"import sys, {tokenizer_training.__name__}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
