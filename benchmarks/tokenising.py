"""Tokens a second of tokenising, against the tokenizers library alone and datasets.map: python benchmarks/tokenising.py

Chats are made of the docstrings of this Python's standard library (parsed, never imported) and repeated; a byte-level
BPE tokenizer of 16,384 tokens is trained on them. All contestants have the same text and cores, and run in turns; each
figure is the median of `--repeats` runs. `encode_batch` alone knows no JSON, roles, masks or files, `datasets.map` cuts
chats and makes masks as the kit does, in one process a core, from a table that is read already. Starting the worker
processes, hashing the source and forcing the store to disk count for the kit.
"""

import argparse
import ast
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loguru import logger

END, PADDING = "<|endoftext|>", "<|padding|>"


def chats() -> Iterator[str]:
    """Two turns a docstring: its first paragraph, then the rest."""
    from openchatkit.formats.chat import Turn, render_text

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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from openchatkit.formats.tokenizer_files import TOKENIZER_FILES

    backend = Tokenizer(models.BPE())
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


def encode_batch_alone(serialised: str, texts: list[str], size: int) -> int:
    """So many texts a call, by as many threads as there are cores."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(serialised)
    calls = (texts[first : first + size] for first in range(0, len(texts), size))
    return sum(sum(map(len, backend.encode_batch(call, add_special_tokens=False))) for call in calls)


def datasets_map(serialised: str, table: object) -> int:
    """The same segments, ids and masks as columns of an Arrow file."""
    from openchatkit.data.stores.workers import cores
    from openchatkit.data.tokenizer import encoder
    from openchatkit.formats import chat

    def columns(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        documents = [chat.parse(text) for text in batch["text"]]
        encoded = iter(encoder_of_process()([part.text for segments in documents for part in segments]))
        tokens, masks = [], []
        for segments in documents:
            row, mask = [], []
            for part in segments:
                ids = next(encoded)
                row += ids
                mask += [part.trained] * len(ids)
            tokens.append([*row, 0])
            masks.append([*mask, segments[-1].trained])
        return {"tokens": tokens, "mask": masks}

    made: list[Callable[[list[str]], list[list[int]]]] = []

    def encoder_of_process() -> Callable[[list[str]], list[list[int]]]:
        if not made:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            made.append(encoder(serialised))
        return made[0]

    done = table.map(columns, batched=True, num_proc=cores(), remove_columns=["text"], load_from_cache_file=False)
    return sum(len(mask) for batch in done.with_format("arrow").iter(1000) for mask in batch["mask"])


def in_turns(repeats: int, *runs: Callable[[], int]) -> list[tuple[int, float]]:
    """Of each run how many tokens it went through, and the median of tokens a second."""
    rates: list[list[float]] = [[] for _ in runs]
    tokens = [0] * len(runs)
    for _ in range(repeats):
        for number, run in enumerate(runs):
            begin = time.perf_counter()
            tokens[number] = run()
            rates[number].append(tokens[number] / (time.perf_counter() - begin))
    return [(count, statistics.median(rate)) for count, rate in zip(tokens, rates, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--copies", type=int, default=1, help="how often the chats are repeated")
    arguments = parser.parse_args()
    import datasets

    from openchatkit.data.records.reader import Records
    from openchatkit.data.stores.cache import cached_store
    from openchatkit.data.stores.tokenise import tokenise_all
    from openchatkit.data.stores.workers import cores
    from openchatkit.data.tokenizer import Tokenizer

    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    datasets.disable_progress_bars()
    texts = list(chats())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(folder, texts[:15_000])
        tokenizer = Tokenizer(folder)
        serialised = tokenizer.serialised
        texts *= arguments.copies
        source = folder / "chats.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        table = datasets.Dataset.from_json(str(source), cache_dir=str(folder / "datasets"))

        def tokenised() -> int:
            with Records(source) as records:
                parts = tokenise_all(records.rows(), tokenizer, separator="end-of-text", processes=cores())
                return sum(len(part.tokens) for _, part in parts)

        def stored() -> int:
            cache = folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            options = {"separator": "end-of-text", "bad_rows": "error", "cache_dir": cache}
            return cached_store(source, tokenizer=tokenizer, **options)[1].tokens

        runs: dict[str, Callable[[], int]] = {
            "tokenizers.encode_batch alone, in one call": lambda: encode_batch_alone(serialised, texts, len(texts)),
            "tokenizers.encode_batch alone, 1,000 texts a call": lambda: encode_batch_alone(serialised, texts, 1000),
            "rows of jsonl to tokens and masks": tokenised,
            "jsonl to a token store": stored,
            "datasets.map, num_proc=cores": lambda: datasets_map(serialised, table),
        }
        measured = in_turns(arguments.repeats, *runs.values())
    print(f"{len(texts):,} chats, {measured[0][0]:,} tokens without end-of-text, {cores()} cores\n")
    print("| what | million tokens/s | against the faster encode_batch |\n|-|-|-|")
    alone = max(rate for _, rate in measured[:2])
    for title, (_, rate) in zip(runs, measured, strict=True):
        print(f"| {title} | {rate / 1e6:.2f} | {rate / alone:.2f} |")


if __name__ == "__main__":
    main()
