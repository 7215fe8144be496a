"""`data.tokenizer`: text in, ids out, and special tokens in a text are only characters."""

import io
import json
import logging
import shutil
from pathlib import Path

import pytest
import tokenizers

from openchatkit.data.tokenizer import Tokenizer, encoder
from openchatkit.errors import UserError

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


def test_encode_and_decode(tokenizer: Tokenizer) -> None:
    assert (tokenizer.end_of_text, tokenizer.padding) == (0, 1)
    ids = tokenizer.encode(["What does it say?", ""])
    assert tokenizer.decode(ids[0]) == "What does it say?"
    assert ids[1] == []
    assert max(ids[0]) < tokenizer.vocab_size


def test_truncation_padding_and_post_processing_are_off(
    tiny_tokenizer: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
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


def test_unusable_tokenizers_are_errors(tiny_tokenizer: Path, tmp_path: Path) -> None:
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


def test_a_tokenizer_without_tokenizer_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UserError, match=r"is a ByT5Tokenizer, which has no tokenizer\.json: expected one of"):
        Tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_encode_end_of_text_as_characters_is_an_error(tmp_path: Path) -> None:
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


def test_a_model_that_transformers_does_not_know_makes_no_noise(tiny_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "neox", "vocab_size": 400}))
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("transformers").addHandler(handler)
    try:
        Tokenizer(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert said.getvalue() == ""


def test_the_digest_changes_with_the_ids(tiny_tokenizer: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert Tokenizer(tiny_tokenizer).digest == tokenizer.digest
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    config["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).digest != tokenizer.digest


def test_a_serialised_tokenizer_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = ["What does it say?", f"{END} é 你好\n", "", "  <|padding|>"]
    assert encoder(tokenizer.serialised)(texts) == tokenizer.encode(texts)
