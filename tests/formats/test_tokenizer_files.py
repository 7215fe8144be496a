"""A tokenizer's files, read without loading it, in every form that models on the hub have."""

import json

import pytest

from openchatkit.errors import UserError
from openchatkit.formats import tokenizer_files
from openchatkit.formats.tokenizer_files import special_token_id, tokenizer_size


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_ordinary_form(tiny_tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_tokenizer)
    assert tokenizer_size(tiny_tokenizer) == len(loaded)
    assert special_token_id(tiny_tokenizer, "eos") == loaded.eos_token_id == 0
    assert special_token_id(tiny_tokenizer, "pad") == loaded.pad_token_id == 1


def test_special_tokens_in_the_older_file_and_as_objects(tmp_path):
    write(
        tmp_path,
        vocab={"a": 0, "b": 1},
        added_tokens={"<end>": 7},
        special_tokens_map={"eos_token": {"content": "<end>"}, "bos_token": "b"},
    )
    assert special_token_id(tmp_path, "eos") == 7
    assert special_token_id(tmp_path, "bos") == 1
    assert special_token_id(tmp_path, "pad") is None
    assert tokenizer_size(tmp_path) == 8


def test_a_unigram_vocabulary(tmp_path):
    write(tmp_path, tokenizer={"model": {"vocab": [["<unk>", 0.0], ["a", -1.0]]}})
    assert tokenizer_size(tmp_path) == 2


def test_no_tokenizer(tmp_path):
    assert not tokenizer_files.has_tokenizer(tmp_path)
    assert tokenizer_size(tmp_path) is None
    assert special_token_id(tmp_path, "eos") is None
    tokenizer_files.check_tokenizer(tmp_path, 1)
    assert tokenizer_files.copy_tokenizer(tmp_path, tmp_path) == []


@pytest.mark.parametrize("content", [{"model": 3}, {"added_tokens": [{"id": 1}]}, {"model": {"vocab": [1]}}])
def test_a_tokenizer_that_is_none(tmp_path, content):
    write(tmp_path, tokenizer=content)
    with pytest.raises(UserError, match=r"holds no tokenizer that can be read: .*; copy its files again"):
        tokenizer_size(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("[1]", "is not a JSON object; fetch or copy"), ("{", "cannot read")])
def test_files_that_are_no_objects(tmp_path, content, message):
    write(tmp_path, tokenizer=content)
    with pytest.raises(UserError, match=message):
        tokenizer_size(tmp_path)


def test_the_template_is_added_to_what_is_there(tmp_path):
    write(tmp_path, tokenizer_config={"eos_token": "é"})
    tokenizer_files.add_chat_template(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == {"eos_token": "é", "chat_template": tokenizer_files.CHAT_TEMPLATE}
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == tokenizer_files.CHAT_TEMPLATE
