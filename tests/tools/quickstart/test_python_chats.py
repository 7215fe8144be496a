"""The quickstart's chats: what is in them, that they are the shell's rendering, and that they come out the same."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.tools.quickstart import python_chats
from openchatkit.tools.quickstart.python_chats import HELD_OUT, PASSAGES, TRAIN, UNKNOWN, Shares
from openchatkit.tools.quickstart.python_docs import DocEntry

ENTRIES = [DocEntry(f"box.part{n}", f"Return part {n} of the box.") for n in range(40)]
ENTRIES += [DocEntry(f"lid.part{n}", f"Return part {n} of the box.") for n in range(40)]


def write(folder: Path, *, seed: int = 1, samples: int = 300, shares: Shares | None = None) -> dict[str, list[dict]]:
    counts = python_chats.write_files(ENTRIES, folder, samples=samples, held_out=0.2, seed=seed, shares=shares)
    found = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}
    assert {name: len(records) for name, records in found.items()} == counts
    return found


def compose(seed: int, **shares: float) -> str:
    words = [word for entry in ENTRIES for word in entry.sentence.split()]
    return python_chats.compose(random.Random(seed), ENTRIES, words, dataclasses.replace(Shares(drill=0.0), **shares))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / folder, seed=seed)
    for name in (TRAIN, HELD_OUT, PASSAGES):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / TRAIN).read_bytes() != (tmp_path / "c" / TRAIN).read_bytes()
    assert (tmp_path / "a" / HELD_OUT).read_bytes() != (tmp_path / "c" / HELD_OUT).read_bytes()


def test_nothing_held_out_is_trained_on(tmp_path):
    files = write(tmp_path)
    trained = "".join(record["text"] for record in files[TRAIN])
    assert len(files[HELD_OUT]) == 16  # a fifth of 40 sentences, each of which two names share
    for record in files[HELD_OUT]:
        name = record["question"].removeprefix("What does ").removesuffix(" do?")
        assert not re.search(rf"{re.escape(name)}\b", trained)
        assert record["answer"] not in trained


def test_a_held_out_record_is_its_parts_and_what_the_shell_would_show(tmp_path):
    record = write(tmp_path)[HELD_OUT][0]
    name, answer = re.fullmatch(r"(\S+): (.+)", record["passage"]).groups()
    assert (record["question"], record["answer"]) == (f"What does {name} do?", answer)
    prompt = chat.render_text([chat.Turn("human", record["question"], (record["passage"],))])
    assert record["text"] == f"{prompt} {answer}\n"


def test_passages_hold_every_entry(tmp_path):
    passages = write(tmp_path)[PASSAGES]
    assert [passage["id"] for passage in passages] == list(range(80))
    assert {passage["title"]: passage["text"] for passage in passages} == {e.name: e.passage for e in ENTRIES}


def test_samples_are_chats_that_end_with_a_reply(tmp_path):
    turns = []
    for record in write(tmp_path)[TRAIN]:
        segments = chat.parse(record["text"])
        assert segments[-1].trained
        assert "".join(segment.text for segment in segments) == record["text"]
        turns.append(sum(segment.trained for segment in segments))
    assert set(turns) == {1, 2, 3}


def test_an_answer_is_the_sentence_of_the_passage_before_it():
    passages = 0
    for seed in range(100):
        text = compose(seed, kept_passages=1.0)
        for said, reply in re.findall(r"<human>: ((?:.|\n)*?)\n<bot>: (.*)\n", text):
            quoted = re.findall(r"(?m)^> \S+: (.*)$", said)
            assert quoted in ([reply], [])
            passages += len(quoted)
    assert passages > 100


def test_earlier_turns_have_no_passage_as_in_the_shell():
    texts = [compose(seed, kept_passages=0.0, several_turns=1.0, max_characters=10**6) for seed in range(50)]
    assert all(text.count(chat.BOT) > 1 for text in texts)
    assert all("> " not in text[: text.rindex(chat.HUMAN)] for text in texts)
    assert any("> " in text for text in texts)


@pytest.mark.parametrize(
    ("shares", "pattern"),
    [
        ({"date": 1.0}, r"Current Date: \d{4}-\d\d-\d\d\nCurrent Time: \d\d:\d\d:\d\d [AP]M \S+\n\n<human>: "),
        ({"date": 0.0}, r"<human>: "),
        ({"small_talk": 0.0, "unknown": 1.0}, rf"(.|\n)*<bot>: {re.escape(UNKNOWN)}\n$"),
        ({"small_talk": 1.0}, r"(.|\n)*<bot>: (Hello!|You are|I am|Goodbye!).*\n$"),
        ({"small_talk": 0, "unknown": 0, "random_words": 0}, r"(.|\n)*<bot>: Return part \d+ of the box\.\n$"),
        ({"several_turns": 0.0}, r"[^<]*<human>: [^<]*<bot>: [^<]*$"),
        ({"several_turns": 1.0, "max_characters": 1}, r"[^<]*<human>: [^<]*<bot>: [^<]*$"),
    ],
)
def test_shares_decide_what_is_drawn(shares, pattern):
    for seed in range(30):
        assert re.match(pattern, compose(seed, **shares)), compose(seed, **shares)


def test_random_sentences_keep_to_their_length():
    texts = [compose(seed, small_talk=0, unknown=0, random_words=1, min_words=2, max_words=4) for seed in range(200)]
    lengths = {len(text.rsplit("<bot>: ", 1)[1].split()) for text in texts}
    assert lengths == {2, 3, 4}


# Of the words abc and xyz.
PIECES = ("a", "ab", "abc", "x", "xy", "xyz")
ENDS = ("c", "bc", "abc", "z", "yz", "xyz")


def test_spliced_words_are_the_beginning_of_one_word_and_the_end_of_another():
    words = ["abc", "xyz"]
    shares = dataclasses.replace(
        Shares(drill=0.0, date=0.0, several_turns=0.0), small_talk=0, unknown=0, random_words=1
    )
    for spliced, expected in ((0.0, {"abc", "xyz"}), (1.0, {f"{a}{b}" for a in PIECES for b in ENDS})):
        seen = set()
        for seed in range(200):
            text = python_chats.compose(
                random.Random(seed), ENTRIES, words, dataclasses.replace(shares, spliced=spliced)
            )
            seen |= set(text.rsplit("<bot>: ", 1)[1].split())
        assert seen == expected


@pytest.mark.parametrize("dated", [0.0, 1.0])
def test_a_drill_is_a_row_of_copying_and_its_date_takes_of_its_room(dated):
    words = [word for entry in ENTRIES for word in entry.sentence.split()]
    shares = Shares(drill=1.0, drill_date=dated, drill_characters=400)
    for seed in range(50):
        text = python_chats.compose(random.Random(seed), ENTRIES, words, shares)
        assert text.startswith("Current Date") == bool(dated)
        assert 300 < len(text) <= 400 + 30
        replies = re.findall(r"(?m)^<bot>: (.*)$", text)
        assert replies == re.findall(r"(?m)^> part\d+: (.*)$", text)
        assert 1 <= len(replies) <= 3


def test_the_command_writes_and_counts(tmp_path, capsys):
    library = tmp_path / "library"
    library.mkdir()
    docs = "".join(f'def f{n}():\n    """Return the number {n} as text."""\n' for n in range(20))
    (library / "numbers_of_mine.py").write_text(docs)
    folder = tmp_path / "files"
    flags = ["--library", str(library), "--save-dir", str(folder), "--samples", "7"]
    with pytest.raises(SystemExit) as ended:
        python_chats.main([*flags, "--held-out", "0.25"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder / TRAIN}: 7 lines",
        f"{folder / HELD_OUT}: 5 lines",
        f"{folder / PASSAGES}: 20 lines",
    ]
    with pytest.raises(SystemExit) as ended:
        python_chats.main([*flags, "--held-out", "1.5"])
    assert ended.value.code == 2
    assert "--held-out 1.5: expected a share between 0 and 1, both excluded" in capsys.readouterr().err


@pytest.mark.parametrize("held_out", [0.001, 0.999])
def test_too_few_names_to_hold_some_out(held_out):
    with pytest.raises(UserError, match=f"--held-out {held_out} of 40 sentences leaves .* expected some of both"):
        python_chats.split(ENTRIES, held_out=held_out, seed=1)
