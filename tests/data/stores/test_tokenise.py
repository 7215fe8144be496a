"""Ids and masks: what a text spells stays text, and exactly the replies are trained on."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from openchatkit import paths
from openchatkit.data.records.document import texts
from openchatkit.data.records.raw_row import Mark, RawRow
from openchatkit.data.stores import tokenise as module
from openchatkit.data.stores.tokenise import Tokenised, separator_ids, tokenise, tokenise_all
from openchatkit.data.tokenizer import Tokenizer, encoder
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn
from openchatkit.formats.token_store import EXCLUDED

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


def rows(texts: Iterable[str]) -> Iterator[RawRow]:
    for number, text in enumerate(texts, 1):
        yield RawRow(number, json.dumps({"text": text}).encode(), Mark(number))


def tokenise_texts(texts: list[str], tokenizer: Tokenizer, *, separator: str = "end-of-text") -> Tokenised:
    closing = separator_ids(tokenizer, separator)
    return tokenise([row.data for row in rows(texts)], tokenizer.encode, closing)


def trained_text(tokenizer: Tokenizer, part: Tokenised) -> list[str]:
    """The text of each run of tokens that are trained on."""
    borders = np.flatnonzero(np.diff(part.mask, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.decode(part.tokens[start:end].tolist()) for start, end in borders]


def test_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.end_of_text, tokenizer.padding) == (0, 1)
    ids = tokenizer.encode(["What does it say?", ""])
    assert tokenizer.decode(ids[0]) == "What does it say?"
    assert ids[1] == []
    assert max(ids[0]) < tokenizer.vocab_size


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    text = f"<human>: {END}<|padding|> ok{END}\n<bot>: {END}\n"
    part = tokenise_texts([text], tokenizer)
    assert part.tokens.tolist().count(0) == 1
    assert part.tokens[-1] == 0
    assert 1 not in part.tokens
    assert tokenizer.decode(part.tokens.tolist()) == text + END


def test_what_tokenizer_json_asks_for_is_off(tiny_tokenizer: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Truncation, padding and tokens put around a text by a post-processor."""
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    config["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    config["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<|padding|>",
    }
    config["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    texts = ["one", "a much longer text than the other"]
    assert Tokenizer(tmp_path).encode(texts) == tokenizer.encode(texts)


def test_tokenizers_that_will_not_do(tiny_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        Tokenizer(tmp_path / "nowhere")
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"expected tokenizer\.json there, found model\.bin"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="cannot be loaded: "):
        Tokenizer(tmp_path)
    shutil.copy(tiny_tokenizer / "tokenizer.json", tmp_path)
    with pytest.raises(UserError, match="has no end-of-text token"):
        Tokenizer(tmp_path)


def test_tokenizers_of_pure_python(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UserError, match=r"is a ByT5Tokenizer, which has no tokenizer\.json: expected one of"):
        Tokenizer(tmp_path)


def test_end_of_text_that_cannot_be_spelt_out(tmp_path: Path) -> None:
    """A vocabulary of words: the word <|endoftext|> is the token."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({END: 0, "a": 1}, unk_token=END))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"takes '<\|endoftext\|>' in a text for its end-of-text token"):
        Tokenizer(tmp_path)


def test_remote_code_is_refused(tiny_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_tokenizer / "tokenizer.json", tmp_path)
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded: "):
        Tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_padding_falls_back_to_end_of_text(tiny_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_tokenizer / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).padding == 0


def test_digest_names_the_ids(tiny_tokenizer: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert Tokenizer(tiny_tokenizer).digest == tokenizer.digest
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    config["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).digest != tokenizer.digest


def test_only_replies_are_trained_on(tokenizer: Tokenizer) -> None:
    turns = [
        Turn("human", "What does it say?", passages=("The first\npassage.", "Another <bot>: one.")),
        Turn("bot", "It says\n\nthis on two lines."),
        Turn("human", "And <bot>: then? <|endoftext|>"),
        Turn("bot", "Nothing."),
    ]
    text = chat.render_text(turns, system="Current Date: 2026-11-20\nCurrent Time: 22:35:00 PM UTC")
    part = tokenise_texts([text], tokenizer)
    assert tokenizer.decode(part.tokens.tolist()) == text + END
    assert trained_text(tokenizer, part) == [" It says\n\nthis on two lines.\n<human>:", f" Nothing.\n{END}"]


def test_chats_that_do_not_end_with_a_reply(tokenizer: Tokenizer) -> None:
    open_end = chat.render_text([Turn("human", "a"), Turn("bot", "b"), Turn("human", "c")])
    part = tokenise_texts([open_end, "no roles at all", "<human>: x\n"], tokenizer)
    assert trained_text(tokenizer, part) == [" b\n<human>:"]
    assert part.tokens[np.cumsum(part.sizes) - 1].tolist() == [0, 0, 0]
    assert not part.mask[part.tokens == 0].any()


def test_random_chats(tokenizer: Tokenizer) -> None:
    """Replies and the ends of their turns, nothing else, whatever the turns hold."""
    generator = random.Random(0)
    words = ["a", "<human>:", "<bot>:", "\n", "  ", END, "é", "你好", "the answer", "> x", "\u200b", "Passages:"]
    chats, expected = [], []
    for _ in range(300):
        turns = []
        for _ in range(generator.randint(1, 4)):
            human, bot = (" ".join(generator.choices(words, k=generator.randint(0, 8))) for _ in range(2))
            passages = tuple(generator.choices(words, k=generator.randint(0, 3)))
            turns += [Turn("human", human, passages), Turn("bot", bot)]
        if generator.random() < 0.2:
            turns.pop()
        replies = [f" {chat.content(turn.text)}\n" for turn in turns if turn.role == "bot"]
        ends = ["<human>:"] * (len(replies) - (turns[-1].role == "bot")) + [END] * (turns[-1].role == "bot")
        expected.append([reply + end for reply, end in zip(replies, ends, strict=True)])
        chats.append(chat.render_text(turns))
    for text, replies in zip(chats, expected, strict=True):
        part = tokenise_texts([text], tokenizer)
        assert trained_text(tokenizer, part) == replies
        assert tokenizer.decode(part.tokens.tolist()) == text + END


@pytest.mark.parametrize("separator", ["end-of-text", "newline"])
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_keep_the_order(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, processes: int, separator: str
) -> None:
    """Bad rows among them, and rows that could not be read."""
    monkeypatch.setattr(module, "_BATCH_BYTES", 200)
    texts = [f"<human>: {'q' * (n % 37)}\n<bot>: {n}\n{END}" for n in range(100)]
    mixed = list(rows(texts))
    mixed.insert(70, RawRow(1070, b"{}", Mark(1070)))
    mixed.insert(30, RawRow(1030, b"", Mark(1030), error="too long"))
    found = list(tokenise_all(iter(mixed), tokenizer, separator=separator, processes=processes))
    assert len(found) > 10
    assert [row for batch, _ in found for row in batch] == mixed
    bad = [(batch[place].number, reason) for batch, part in found for place, reason in part.bad]
    assert bad == [(1030, "too long"), (1070, "the record has no 'text' and no 'messages' (its keys: none)")]
    whole = tokenise_texts(texts, tokenizer, separator=separator)
    for name in ("tokens", "sizes", "mask"):
        assert np.array_equal(np.concatenate([getattr(part, name) for _, part in found]), getattr(whole, name))
    assert len(whole.sizes) == 100


def test_newlines_between_documents_are_the_original_stream(tokenizer: Tokenizer) -> None:
    texts = ["<human>: a\n<bot>: b", "plain", "<human>: a\n<bot>: b\n<human>: c"]
    part = tokenise_texts(texts, tokenizer, separator="newline")
    assert tokenizer.decode(part.tokens.tolist()) == "\n".join([*texts, ""])
    assert trained_text(tokenizer, part) == [" b\n", " b\n<human>:"]
    assert 0 not in part.tokens


def test_an_untrained_reply_at_the_end(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    part = tokenise([json.dumps({"messages": turns}).encode()], tokenizer.encode, [0])
    assert tokenizer.decode(part.tokens.tolist()) == f"<human>: a\n<bot>: b\n{END}"
    # `b`, the end of its turn and of the chat: never trained on.
    assert part.mask.tolist()[-4:] == [EXCLUDED] * 4
    assert not part.mask[:-4].any()


def test_only_bad_rows(tokenizer: Tokenizer) -> None:
    part = tokenise([b"", b"{}"], tokenizer.encode, [0])
    assert (len(part.tokens), len(part.sizes), len(part.mask), len(part.bad)) == (0, 0, 0, 2)


@pytest.mark.parametrize("processes", [0, 2])
def test_an_error_among_the_rows_comes_through(tokenizer: Tokenizer, processes: int) -> None:
    def broken() -> Iterator[RawRow]:
        yield from rows(["fine"])
        raise UserError("line 2")

    with pytest.raises(UserError, match="line 2"):
        list(tokenise_all(broken(), tokenizer, separator="end-of-text", processes=processes))


def test_a_killed_worker_is_told(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    parts = tokenise_all(rows(map(str, range(10**6))), tokenizer, separator="end-of-text", processes=2)
    next(parts)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(Interrupted, match=r"killed, most likely for lack of memory: .* goes on where it stopped"):
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


@pytest.mark.parametrize("way", ["file", "command", "stdin"])
def test_a_main_script_without_a_guard(tiny_tokenizer: Path, tmp_path: Path, way: str) -> None:
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


def test_a_daemonic_process_tokenises_by_itself(tiny_tokenizer: Path) -> None:
    context = multiprocessing.get_context("spawn")
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


def test_a_serialised_tokenizer_is_the_same(tokenizer: Tokenizer) -> None:
    texts = ["What does it say?", f"{END} é 你好\n", "", "  <|padding|>"]
    assert encoder(tokenizer.serialised)(texts) == tokenizer.encode(texts)


def test_the_record_that_the_readme_shows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    readme = (paths.ROOT / "data" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(readme.split("```json\n")[1].split("```")[0])
    part = tokenise_texts(list(texts(tmp_path / "a.jsonl")), tokenizer)
    assert trained_text(tokenizer, part) == [" Paris.\n<human>:", f" Rome.\n{END}", f" Madrid.\n{END}"]
