"""CharLevelTokenizer from a corpus to a chat: bytes are ids, and characters of several bytes come out whole."""

import json
import subprocess
import sys

import pytest
from neox_cases import SMALLEST
from test_deepy import deepy

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import neox_tokenizers, tokenizer_files
from openchatkit.inference.streaming import Detokeniser
from openchatkit.paths import ROOT

REPLY = "Grüße, 猫 😀!"
CHAT = f"<human>: hello\n<bot>: {REPLY}\n<human>: hello\n<bot>: {REPLY}\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("characters")
    serialised = neox_tokenizers.load("CharLevelTokenizer", None, None).to_json()
    names = {"end_of_text": neox_tokenizers.END_OF_TEXT, "padding": neox_tokenizers.PADDING}
    tokenizer_files.write_tokenizer(folder, serialised, **names)
    return Tokenizer(folder)


def test_a_character_is_shown_with_its_last_byte(tokenizer):
    detokeniser = Detokeniser(tokenizer.decode)
    shown = [detokeniser.push(byte) for byte in REPLY.encode()]
    expected = []
    for character in REPLY:
        expected += [""] * (len(character.encode()) - 1) + [character]
    assert shown == expected


def test_rows_of_the_embedding_without_a_byte_are_no_text(tokenizer):
    """The model has 512 rows, as GPT-NeoX's; one trained for a moment gives the others, too."""
    detokeniser = Detokeniser(tokenizer.decode)
    ids = [id for byte in REPLY.encode() for id in (256, byte, 511)]
    assert "".join(map(detokeniser.push, ids)) == REPLY
    assert tokenizer.decode(ids) == REPLY


@pytest.mark.long
def test_from_a_corpus_to_a_chat(tmp_path):
    def run(script, *arguments, typed=""):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, input=typed, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "data" / "enron").mkdir(parents=True)
    (tmp_path / "data" / "enron" / "mine.jsonl").write_text(json.dumps({"text": CHAT}) + "\n")
    run("neox/prepare_data.py", "enron", "-t", "CharLevelTokenizer", "-d", "./data/")
    settings = {name: value for name, value in SMALLEST.items() if name != "tokenizer_type"} | {
        "num_layers": 2,
        "hidden_size": 64,
        "seq_length": 256,
        "max_position_embeddings": 256,
        "lr_decay_style": "constant",
        "warmup": 0.1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.003}},
        "train_iters": 150,
        "split": "1",
        "data_path": "data/enron/enron_text_document",
        "save": "checkpoints",
        "load": "checkpoints",
        "num_gpus": 1,
    }
    (tmp_path / "small.json").write_text(json.dumps(settings))
    done = deepy(tmp_path, "pretrain_gpt2.py", "small.json")
    assert done.returncode == 0, done.stderr
    run("tools/convert_to_hf_gptneox.py", "--ckpt-path", "checkpoints", "--save-path", "model")
    answer = run("inference/bot.py", "--model", "model", "--temperature", "0", "--max-tokens", "30", typed="hello\n")
    assert answer.strip() == REPLY
