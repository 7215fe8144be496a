"""Small models to chat with, and the real command driven through a pipe."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from make_once import MakeOnce
from random_models import SMALL, add_tokenizer

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn
from openchatkit.inference import bot
from openchatkit.paths import ROOT

BOT = ROOT / "inference" / "bot.py"


@pytest.fixture(autouse=True)
def chat_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of saved chats and history, for this test alone."""
    monkeypatch.setenv("OPENCHATKIT_HOME", str(tmp_path / "chat_home"))
    return tmp_path / "chat_home"


@pytest.fixture(scope="session")
def trained_model(tiny_tokenizer: Path, make_once: MakeOnce) -> Path:
    """A GPT-NeoX that has learnt, in seconds, to answer from the passage, to count its turns, and to end its replies.

    It says "日本 <passage>" to a question with a passage, "two\nlines" to "lines", and "first" or "again" else.
    """
    return make_once("trained_model", lambda folder: _write_trained_model(folder, tiny_tokenizer))


def _write_trained_model(folder: Path, tiny_tokenizer: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = Tokenizer(tiny_tokenizer)
    rows, labels = zip(*(_row(tokenizer, lesson) for lesson in _LESSONS), strict=True)
    config = GPTNeoXConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=192,
        **SMALL,
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Not nearer to zero: whether another turn or end-of-text follows a reply is nothing to be known.
    assert loss < 0.05, loss
    model.save_pretrained(folder)
    add_tokenizer(tiny_tokenizer, folder)


@pytest.fixture(scope="session")
def endless_model(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX that says "la la la ..." without end: a ring of tokens, each sure of the next, others of the first."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=1 << 20,
        **SMALL,
    )
    model = GPTNeoXForCausalLM(config)
    ring = Tokenizer(tiny_tokenizer).encode([" la"])[0]
    with torch.no_grad():
        for parameter in (*model.gpt_neox.layers.parameters(), *model.lm_head.parameters()):
            parameter.zero_()
        embedding = model.get_input_embeddings().weight.zero_()
        embedding[:, len(ring) - 1] = 1.0
        for place, token in enumerate(ring):
            embedding[token] = torch.nn.functional.one_hot(torch.tensor(place), embedding.shape[1])
            model.lm_head.weight[ring[(place + 1) % len(ring)], place] = 10.0
    folder = tmp_path_factory.mktemp("endless_model")
    model.save_pretrained(folder)
    add_tokenizer(tiny_tokenizer, folder)
    return folder


@dataclass(frozen=True)
class Done:
    """What a run of the command left: bytes on stdout and stderr, and its exit status."""

    stdout: bytes
    stderr: bytes
    status: int

    @property
    def lines(self) -> list[str]:
        return self.stdout.decode().splitlines()

    @property
    def notes(self) -> list[str]:
        return self.stderr.decode().splitlines()


@pytest.fixture(scope="session")
def pipe(quick_python: Path) -> Callable[..., Done]:
    """Run inference/bot.py as a process with some bytes piped in."""

    def run(sent: bytes, model: Path, *flags: str) -> Done:
        done = subprocess.run(
            [quick_python, BOT, "--model", str(model), *flags],
            input=sent,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=120,
            check=False,
        )
        return Done(done.stdout, done.stderr, done.returncode)

    return run


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The same without the seconds that a process takes to start: its main() with the three streams replaced."""

    def run(sent: str | bytes, model: Path | str, *flags: str) -> Done:
        data = sent.encode() if isinstance(sent, str) else sent
        streams = [io.TextIOWrapper(io.BytesIO(content), encoding="ascii") for content in (data, b"", b"")]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            stream.reconfigure(encoding="utf-8")
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            bot.main(["--model", str(model), *flags])
        for stream in streams[1:]:
            stream.flush()
        return Done(streams[1].buffer.getvalue(), streams[2].buffer.getvalue(), ended.value.code)

    return run


_LESSONS = (
    ("hello", "first"),
    ("hello", "first", "hello", "again"),
    ("hello", "first", "hello", "again", "hello", "again"),
    ("lines", "two\nlines"),
    ("hello", "first", "lines", "two\nlines"),
    (("say it", "red"), "日本 red"),
    (("say it", "blue"), "日本 blue"),
    ("hello", "first", ("say it", "red"), "日本 red"),
    ("say it", "日本 nothing"),
    (("say it", "blue"), "日本 blue", "say it", "日本 nothing"),
)


def _row(tokenizer: Tokenizer, lesson: Sequence[str | tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a lesson, padded to one length; end-of-text is part of the last reply."""
    turns, clear = [], True
    for number, part in enumerate(lesson):
        text, *passages = (part,) if isinstance(part, str) else part
        # As in the shell, only the last question keeps its passage; a reply without its own is not to be learnt.
        last = number >= len(lesson) - 2
        clear = clear and (last or not passages)
        turns.append(Turn("bot" if number % 2 else "human", text, tuple(passages) if last else ()))
    segments = chat.render(turns)
    ids, labels = [], []
    for number, piece in enumerate(tokenizer.encode([segment.text for segment in segments])):
        learnt = segments[number].trained and (clear or number == len(segments) - 1)
        ids += piece
        labels += piece if learnt else [-100] * len(piece)
    padding = 96 - len(ids) - 1
    assert padding >= 0, len(ids)
    end = tokenizer.end_of_text
    return ids + [end] * (1 + padding), labels + [end] + [-100] * padding
