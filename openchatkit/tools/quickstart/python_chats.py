"""Chats that teach a small model to answer from the passage it is given, made of the standard library's docstrings.

Owns which samples a model sees and in what shares; `formats.chat` renders them. Most samples are what the shell shows a
model: often a date, one to three turns, and a passage in the last one alone, since the shell drops a passage once it is
answered from. In some, earlier turns keep theirs: clients of the chat template may send them so, and such a row teaches
several answers at once. Three kinds of reply are taught: the passage's sentence, `UNKNOWN` where there is no passage,
and small talk.

In most samples the sentence is random words of the corpus, some of them spliced from two words. A model cannot memorise
such sentences, so it has to learn to copy, and then also answers from passages that it has never seen.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from openchatkit import cli, paths, storage
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.tools.quickstart.python_docs import DocEntry, read_library, standard_library

FOLDER = paths.ROOT / "data" / "python-docs" / "files"
TRAIN, HELD_OUT, PASSAGES = "train.jsonl", "heldout.jsonl", "passages.jsonl"

UNKNOWN = "I do not know. Give me a passage about it."
QUESTION = "What does {} do?"
_FRAME = 56  # characters of a turn around its names and sentences
_OTHER_QUESTIONS = ("What is {}?", "What does {} do", "what does {} do?", "Tell me about {}.", "Explain {}.", "{}?")
_SMALL_TALK = (
    (("Hello", "Hello!", "hello", "Hi", "Hi!", "hi", "Hey", "Good morning!"), "Hello! Ask me what a Python name does."),
    (("Thanks", "Thanks!", "thanks", "Thank you.", "Great!"), "You are welcome."),
    (
        ("Who are you?", "What are you?", "who are you?"),
        "I am a small model that answers from the passage it is given.",
    ),
    (("Bye", "Bye!", "Goodbye.", "See you."), "Goodbye!"),
)


@dataclass(frozen=True)
class Shares:
    """Probabilities of each kind of sample, numbers of words, and the longest sample in characters."""

    drill: float = 0.6
    drill_characters: int = 405  # of a drill, about
    drill_date: float = 0.1  # a date takes room in which nothing is trained on
    spliced: float = 0.3  # of random words, those made of parts of two words
    # Of the samples that are no drill:
    date: float = 0.6
    several_turns: float = 0.85
    third_turn: float = 0.5  # of the samples with several turns
    kept_passages: float = 0.6  # of the samples with several turns, those whose earlier turns keep their passages
    small_talk: float = 0.04
    unknown: float = 0.06  # questions without a passage
    random_words: float = 0.6  # of the questions with a passage
    other_question: float = 0.2
    min_words: int = 3
    max_words: int = 14
    max_characters: int = 405


def split(entries: Sequence[DocEntry], *, held_out: float, seed: int) -> tuple[list[DocEntry], list[DocEntry]]:
    """Split entries into training and held-out ones, both sorted; no name and no sentence is in both."""
    sentences = sorted({entry.sentence for entry in entries})
    chosen = set(random.Random(seed).sample(sentences, round(held_out * len(sentences))))
    kept: list[DocEntry] = []
    held: list[DocEntry] = []
    for entry in sorted(entries):
        (held if entry.sentence in chosen else kept).append(entry)
    if not kept or not held:
        raise UserError(
            f"--held-out {held_out:g} of {len(sentences)} sentences leaves {len(kept)} names to train on and "
            f"{len(held)} to ask about: expected some of both; change it"
        )
    return kept, held


def compose(rng: random.Random, entries: Sequence[DocEntry], words: Sequence[str], shares: Shares) -> str:
    """Compose one training sample as text; random sentences are made of `words`."""
    drill = rng.random() < shares.drill
    dated = rng.random() < (shares.drill_date if drill else shares.date)
    system = chat.preamble(_random_time(rng)) if dated else ""
    if drill:
        return chat.render_text(_drill(rng, entries, words, shares, len(system)), system=system)
    earlier: list[list[chat.Turn]] = []
    if rng.random() < shares.several_turns:
        kept = rng.random() < shares.kept_passages
        for _ in range(2 if rng.random() < shares.third_turn else 1):
            earlier.append(_turn(rng, entries, words, shares) if kept else _turn_of_history(rng, entries, shares))
    last = _turn(rng, entries, words, shares)
    while True:
        text = chat.render_text([turn for pair in earlier for turn in pair] + last, system=system)
        if not earlier or len(text) <= shares.max_characters:
            return text
        earlier.pop(0)


def _held_out_record(entry: DocEntry) -> dict[str, str]:
    """Return a question that the model has not seen, in parts and as the text of a training sample."""
    question = QUESTION.format(entry.name)
    turns = [chat.Turn("human", question, (entry.passage,)), chat.Turn("bot", entry.sentence)]
    return {
        "question": question,
        "passage": entry.passage,
        "answer": entry.sentence,
        "text": chat.render_text(turns),
    }


def write_files(
    entries: Sequence[DocEntry], folder: Path, *, samples: int, held_out: float, seed: int, shares: Shares | None = None
) -> dict[str, int]:
    """Write the three files into `folder`, the passages last; returns the number of lines of each.

    The same entries, numbers and seed give the same bytes.
    """
    kept, held = split(entries, held_out=held_out, seed=seed)
    words = sorted({word for entry in kept for word in entry.sentence.split()})
    rng, shares = random.Random(seed), shares or Shares()
    texts = ({"text": compose(rng, kept, words, shares)} for _ in range(samples))
    passages = ({"id": n, "title": entry.name, "text": entry.passage} for n, entry in enumerate(sorted(entries)))
    return {
        name: _write_jsonl(folder / name, records)
        for name, records in ((TRAIN, texts), (HELD_OUT, map(_held_out_record, held)), (PASSAGES, passages))
    }


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Write the files and print how many lines each has."""
    parser = cli.Parser(
        prog="data/python-docs/prepare.py",
        description="Write questions and answers about the Python that runs this, from its docstrings.",
    )
    parser.add_argument("--library", type=Path, default=standard_library(), help="folder of Python sources to read")
    parser.add_argument("--save-dir", type=Path, default=FOLDER, help="where the files go")
    parser.add_argument("--samples", type=cli.positive_int, default=16000, help="chats to train on")
    parser.add_argument(
        "--held-out", type=cli.non_negative_float, default=0.1, help="share of sentences not trained on"
    )
    parser.add_argument("--seed", type=cli.natural, default=1, help="decides what is held out and what is drawn")
    args = parser.parse_args(argv)
    if not 0 < args.held_out < 1:
        raise UserError(f"--held-out {args.held_out:g}: expected a share between 0 and 1, both excluded")
    entries = read_library(args.library)
    counts = write_files(entries, args.save_dir, samples=args.samples, held_out=args.held_out, seed=args.seed)
    for name, lines in counts.items():
        print(f"{args.save_dir / name}: {lines} lines")


def _drill(
    rng: random.Random, entries: Sequence[DocEntry], words: Sequence[str], shares: Shares, taken: int
) -> list[chat.Turn]:
    """Make a drill in copying alone: in one to three turns, about as many random words as a row can hold.

    A row teaches as much as it has tokens of replies; real replies fill a tenth of theirs, which is why names are short
    here and dates rare. `taken` characters of the row are used already.
    """
    turns: list[chat.Turn] = []
    count = rng.randint(1, 3)
    for _ in range(count):
        name = rng.choice(entries).name.rpartition(".")[2]
        # The name stands in the passage and in the question, the sentence in the passage and in the reply.
        room = ((shares.drill_characters - taken) // count - 2 * len(name) - _FRAME) // 2
        sentence = _word(rng, words, shares)
        while len(longer := f"{sentence} {_word(rng, words, shares)}") < room:
            sentence = longer
        entry = DocEntry(name, sentence)
        turns += [chat.Turn("human", QUESTION.format(name), (entry.passage,)), chat.Turn("bot", sentence)]
    return turns


def _random_sentence(rng: random.Random, words: Sequence[str], shares: Shares) -> str:
    return " ".join(_word(rng, words, shares) for _ in range(rng.randint(shares.min_words, shares.max_words)))


def _word(rng: random.Random, words: Sequence[str], shares: Shares) -> str:
    """Draw a word of the corpus, or splice the beginning of one and the end of another: endless new token sequences."""
    word = rng.choice(words)
    if rng.random() >= shares.spliced:
        return word
    other = rng.choice(words)
    return word[: rng.randint(1, len(word))] + other[rng.randint(0, len(other) - 1) :]


def _turn_of_history(rng: random.Random, entries: Sequence[DocEntry], shares: Shares) -> list[chat.Turn]:
    """Draw an earlier turn, without its passage; mostly one whose reply does not need it."""
    kind = rng.random()
    if kind < 0.4:
        return _small_talk(rng)
    entry = rng.choice(entries)
    answer = UNKNOWN if kind < 0.7 else entry.sentence
    return [chat.Turn("human", _question(rng, entry.name, shares)), chat.Turn("bot", answer)]


def _turn(rng: random.Random, entries: Sequence[DocEntry], words: Sequence[str], shares: Shares) -> list[chat.Turn]:
    """Draw a turn as it is when its reply is due."""
    kind = rng.random()
    if kind < shares.small_talk:
        return _small_talk(rng)
    entry = rng.choice(entries)
    question = _question(rng, entry.name, shares)
    if kind < shares.small_talk + shares.unknown:
        return [chat.Turn("human", question), chat.Turn("bot", UNKNOWN)]
    if rng.random() < shares.random_words:
        entry = DocEntry(entry.name, _random_sentence(rng, words, shares))
    return [chat.Turn("human", question, (entry.passage,)), chat.Turn("bot", entry.sentence)]


def _small_talk(rng: random.Random) -> list[chat.Turn]:
    said, reply = rng.choice(_SMALL_TALK)
    return [chat.Turn("human", rng.choice(said)), chat.Turn("bot", reply)]


def _question(rng: random.Random, name: str, shares: Shares) -> str:
    form = rng.choice(_OTHER_QUESTIONS) if rng.random() < shares.other_question else QUESTION
    return form.format(name)


def _random_time(rng: random.Random) -> datetime:
    zone = timezone.utc if rng.random() < 0.5 else timezone(timedelta(0), rng.choice(("CET", "EST", "PDT", "+03")))
    return datetime(2024, 1, 1, tzinfo=zone) + timedelta(seconds=rng.randrange(12 * 365 * 86400))


def _write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> int:
    count = 0
    with storage.atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            count += 1
            file.write(json.dumps(record) + "\n")
    return count
