"""A moderation model that learns, in seconds, a rule that a test can check, from records that training would take."""

import shutil
from pathlib import Path

import pytest
import torch
from make_once import MakeOnce
from moderation_rule import FILLER, RULE, labelled_rows

from openchatkit.data.stores.tokenise import separator_ids, tokenise
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import moderation
from openchatkit.formats.token_store import TRAINED

VOCABULARY = 512
STEPS = 120


@pytest.fixture(scope="session")
def moderation_tokenizer(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer in which the prompt's words, and the rule's, are tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("moderation_tokenizer")
    shutil.copytree(tiny_tokenizer, folder, dirs_exist_ok=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " ".join((*FILLER, *(word for word, _ in RULE)))
    backend.train_from_iterator([moderation.prompt(words), *map(moderation.continuation, moderation.LABELS)], trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def moderation_model(moderation_tokenizer: Path, make_once: MakeOnce) -> Path:
    """A GPT-NeoX that has learnt the rule."""
    return make_once("moderation_model", lambda folder: _write_moderation_model(folder, moderation_tokenizer))


def _write_moderation_model(folder: Path, moderation_tokenizer: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = Tokenizer(moderation_tokenizer)
    data = tokenise(labelled_rows(512), tokenizer.encode, separator_ids(tokenizer, "end-of-text"))
    assert not data.bad
    length = int(data.sizes.max())
    ids = torch.full((len(data.sizes), length), tokenizer.padding)
    labels = torch.full_like(ids, -100)
    start = 0
    for row, size in enumerate(data.sizes.tolist()):
        tokens = torch.from_numpy(data.tokens[start : start + size].astype("int64"))
        ids[row, :size] = tokens
        labels[row, :size] = tokens.where(torch.from_numpy(data.mask[start : start + size] == TRAINED), -100)
        start += size
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=192,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        rows = slice(step * 16 % len(ids), step * 16 % len(ids) + 16)
        loss = model(input_ids=ids[rows], labels=labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05, loss
    model.save_pretrained(folder)
    shutil.copytree(moderation_tokenizer, folder, dirs_exist_ok=True)
