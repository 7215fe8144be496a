"""A model for benchmarks of chatting: GPT-NeoX of Pythia-160m's width, its embedding tied to its output layer or not.

At 12 layers of 768 and 50,304 words it has 124 M parameters. It is trained for a while on the sources of Python's
standard library, so that its perplexity is finite and its greedy text is no noise; every 20th file is held out. Made
once for each set of options, and kept in a folder.
"""

import math
import sysconfig
import time
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit import progress
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats.hf_model import WEIGHTS
from openchatkit.formats.tokenizer_files import add_chat_template, write_tokenizer
from openchatkit.tools.tokenizer_training import END_OF_TEXT, PADDING, train

VOCABULARY = 50304
WORDS = 8192  # tokens that the tokenizer has; the other rows are there to be read
LENGTH, ROWS = 256, 1  # small batches: in a minute or two, the number of steps is what counts
HELD_OUT = 20
CHARACTERS = 12_000_000


def sources(*, held_out: bool) -> list[str]:
    """Modules of the standard library: every 20th is held out, of the others the first dozen million characters."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    texts, total = [], 0
    for number, path in enumerate(paths):
        if (number % HELD_OUT == 0) == held_out and total < CHARACTERS:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            total += len(texts[-1])
    return texts


def model_folder(root: Path, *, layers: int, width: int, seconds: float, tied: bool = True) -> Path:
    """The folder of the model, in bfloat16; made, and trained for `seconds`, where it is not there."""
    folder = root / f"neox-{layers}-{width}-{seconds:g}s{'' if tied else '-untied'}"
    if (folder / WEIGHTS).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = sources(held_out=False)
    whole = train(texts, WORDS).to_str()
    write_tokenizer(folder, whole, end_of_text=END_OF_TEXT, padding=PADDING)
    add_chat_template(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=0,
        # No token of the tokenizer's: replies are to have their full length.
        eos_token_id=VOCABULARY - 1,
        pad_token_id=1,
    )
    model = GPTNeoXForCausalLM(config)
    if seconds:
        tokenizer = Tokenizer(folder)
        tokens = torch.tensor([token for ids in tokenizer.encode(texts) for token in (*ids, tokenizer.end_of_text)])
        _train(model, tokens, seconds)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _train(model: GPTNeoXForCausalLM, tokens: torch.Tensor, seconds: float) -> None:
    """AdamW on random windows, with a rate that falls to nothing as the time runs out."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    started = time.perf_counter()
    with progress.bar(round(seconds), "training the model", unit="s") as bar:
        while (past := time.perf_counter() - started) < seconds:
            bar.update(round(past) - bar.n)
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 0.05 + 20 * past / seconds) * (1 - past / seconds)
            starts = torch.randint(len(tokens) - LENGTH, (ROWS,), generator=generator)
            rows = torch.stack([tokens[start : start + LENGTH] for start in starts])
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=rows, labels=rows).loss
            assert math.isfinite(loss.item()), "the training diverged"
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}")
