"""GPT-NeoX's tokenizers as tokenizer.json: what training and chat are given."""

import pytest
from tokenizers import Tokenizer

from openchatkit.formats import neox_tokenizers

TEXTS = ["Hello <|endoftext|> ünïcode Ā\n\t \xad 日本 x", "  two  spaces ", "\x7f\x80 don't"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_the_same_ids_in_a_tokenizer_json(text):
    characters = neox_tokenizers.load("CharLevelTokenizer", None, None)
    library = Tokenizer.from_str(characters.to_json())
    library.encode_special_tokens = True
    ids = library.encode(text, add_special_tokens=False).ids
    assert [ids] == characters.encode([text], literal=True)
    assert library.decode(ids) == text


def test_no_text_of_characters_spells_their_end():
    library = Tokenizer.from_str(neox_tokenizers.load("CharLevelTokenizer", None, None).to_json())
    library.encode_special_tokens = True
    assert library.encode("a\x00\x01b", add_special_tokens=False).ids == [97, 1, 1, 98]
    assert library.token_to_id(neox_tokenizers.END_OF_TEXT) == 0
