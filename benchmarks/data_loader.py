"""Tokens a second of tokenising and of the loader: python benchmarks/data_loader.py

Chats are made of the docstrings of this Python's standard library (parsed, never imported), and a byte-level BPE
tokenizer of 16,384 tokens is trained on them. Tokenising is compared with `tokenizers.encode_batch` alone on the same
texts and cores; the loader runs on one core. Each figure is the median of `--repeats` runs, taken in turns.
"""

import argparse
import ast
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loguru import logger
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from openchatkit.data.dataset import build_dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.tokenise import tokenise_all
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats.chat import Turn, render_text
from openchatkit.formats.tokenizer_files import TOKENIZER_FILES

END, PADDING = "<|endoftext|>", "<|padding|>"


def chats() -> Iterator[str]:
    """Two turns a docstring: its first paragraph, then the rest."""
    for path in sorted(Path(os.__file__).parent.glob("**/*.py")):
        try:
            nodes = list(ast.walk(ast.parse(path.read_bytes())))
        except (SyntaxError, ValueError):
            continue
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                text = text.replace("\0", "")  # a few spell out the character that no record may hold
                first, _, rest = text.partition("\n\n")
                turns = [Turn("human", f"What is {node.name}?"), Turn("bot", first)]
                yield render_text([*turns, Turn("human", "And more?"), Turn("bot", rest)] if rest else turns)


def train_tokenizer(folder: Path, texts: list[str]) -> None:
    """Write a byte-level BPE tokenizer of 16,384 tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16384, special_tokens=[END, PADDING], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(folder / TOKENIZER_FILES[0]))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PADDING}
    (folder / TOKENIZER_FILES[1]).write_text(json.dumps(config), encoding="utf-8")


def in_turns(repeats: int, *runs: Callable[[], int]) -> list[float]:
    """Median tokens a second of each run; a run returns how many tokens it went through."""
    rates: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for rate, run in zip(rates, runs, strict=True):
            begin = time.perf_counter()
            tokens = run()
            rate.append(tokens / (time.perf_counter() - begin))
    return [statistics.median(rate) for rate in rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    texts = list(itertools.islice(chats(), 15_000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder, texts)
        tokenizer = Tokenizer(folder)
        backend = Backend.from_file(str(folder / TOKENIZER_FILES[0]))
        source = folder / "chats.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

        def alone() -> int:
            return sum(map(len, backend.encode_batch(texts, add_special_tokens=False)))

        def ours() -> int:
            return sum(len(part.tokens) for part in tokenise_all(texts, tokenizer))

        rates = in_turns(repeats, alone, ours)
        print(f"{len(texts):,} chats, {ours():,} tokens, {len(os.sched_getaffinity(0))} cores")
        print(f"| tokenizers.encode_batch alone | {rates[0] / 1e6:.2f} million tokens/s |")
        print(f"| tokenise_all, with masks      | {rates[1] / 1e6:.2f} million tokens/s, {rates[1] / rates[0]:.2f} x |")
        for packing, seq_length in (("concat", 2048), ("none", 256)):
            for loss_on in ("all", "responses"):
                data = build_dataset(
                    str(source),
                    DataOptions(folder, seq_length, packing=packing, loss_on=loss_on, cache_dir=folder / "cache"),
                )
                rows = 1_000_000 // seq_length
                starts = iter(range(0, sys.maxsize, rows))
                (rate,) = in_turns(repeats, lambda d=data, r=rows, s=starts: d.batch(next(s), r).tokens.numel())
                print(f"| batch, {packing:6} {loss_on:9} {seq_length:4} | {rate / 1e6:.1f} million tokens/s |")


if __name__ == "__main__":
    main()
