"""A sentence encoder for tests: a BERT of one layer that passes on its random word vectors, so that a text's vector is
the mean of its words' and texts with the same words are near each other."""

import json
from pathlib import Path

TEXT = """
a about after all an and any apple are arm as at axe bake banana bark bell bird blue boat boil book bread bridge bucket
by cake can castle cat chair cheese clock cloud coat coin cold copy cow cup dance day deep delete desk dog door dry each
ear east eat egg eight engine evening every eye fall farm fast field fire fish five flour flower fly for forest four fox
from garden gate glass gold grass green grow hand hat have heat hill hold honey horse hot house how ice in iron is it
jump key king kitchen lake lamp leaf left light lion list long loud make map market milk mill moon morning mountain name
new night nine north not of oil old on one open orange oven paint paper pear pen people piano pipe plain plant plum pond
queen quick rain read red ride river road rock roof room rope round run sail salt sand sea see seed seven sheep ship
shoe short silver six sky sleep slow small snow song south spoon star stone storm street sugar summer sun swim table tea
that the this three to town train tree two under up violin walk wall warm water wave way weather week west wheat wheel
where which white wind window winter wolf wood wool write year yellow
"""
WORDS = TEXT.split()


def make_encoder(
    folder: Path, *, plain: bool = False, seed: int = 0, dimension: int = 32, similarity: str | None = None
) -> Path:
    """Write an encoder of 64 tokens into a folder; a `plain` one is a BERT without sentence-transformers' settings."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=size,
        hidden_size=dimension,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=1.0,
    )
    model = BertModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "position" in name or "token_type" in name or "output.dense" in name:
                weight.zero_()
    model.save_pretrained(folder)
    if plain:
        return folder
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    rows = [
        {"idx": int(name), "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for name, path, kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": dimension, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}', encoding="utf-8")
    if similarity:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": similarity}))
    return folder


def write_tokenizer(folder: Path) -> int:
    """Write a WordPiece tokenizer that knows `WORDS`, and letters for all others; how many tokens it has."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{each}" for each in letters), *WORDS]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}
    config |= {f"{name}_token": token for name, token in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(vocabulary)


def make_cross_encoder(folder: Path, *, labels: int = 1) -> Path:
    """A random BERT that scores pairs."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    size = write_tokenizer(folder)
    config = BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        initializer_range=1.0,
        num_labels=labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder
