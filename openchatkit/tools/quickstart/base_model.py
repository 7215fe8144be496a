"""A small GPT-NeoX with random weights: the command `pretrained/Quickstart/prepare.py`.

A byte-level BPE tokenizer is trained on a jsonl file of chats and the weights are drawn at random, as a Hugging Face
folder, which is then prepared like any model of the hub.
"""

import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit import cli, paths
from openchatkit.errors import UserError
from openchatkit.tools.quickstart.python_chats import FOLDER, TRAIN
from openchatkit.tools.tokenizer_training import END_OF_TEXT, PADDING, train

NAME = "Quickstart"
_TOKENIZER_RECORDS = 8000  # more of them do not change a vocabulary this small


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the network and of its tokenizer, and how its weights are drawn.

    They are chosen so that copying is learnt from few tokens: attention does it, so the MLPs are narrow; in a small
    vocabulary each token is seen more often; and most dimensions of a head do not rotate, for matching by content.
    """

    vocab_size: int = 1024
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    intermediate_size: int = 128
    max_positions: int = 1024
    rotary_fraction: float = 0.25
    # In a narrow network, weights as small as those of large ones would be lost beside the norms' unit scale.
    init_std: float = 0.05
    tie_embeddings: bool = True


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Make the model and print where it is."""
    shape = ModelShape()
    parser = cli.Parser(
        prog=f"pretrained/{NAME}/prepare.py",
        description="Train a tokenizer, draw a small GPT-NeoX at random, and make layer shards of it, for training.",
    )
    parser.add_argument(
        "--data", type=Path, default=FOLDER / TRAIN, help="jsonl of chats that the tokenizer is trained on"
    )
    parser.add_argument("--save-dir", type=Path, default=paths.PRETRAINED / NAME, help=f"where {NAME}/ is made")
    parser.add_argument("--vocab-size", type=cli.positive_int, default=shape.vocab_size, help="tokens")
    parser.add_argument(
        "--hidden-size", type=cli.positive_int, default=shape.hidden_size, help="width, of the MLPs too"
    )
    parser.add_argument("--layers", type=cli.positive_int, default=shape.num_layers)
    parser.add_argument("--heads", type=cli.positive_int, default=shape.num_heads, help="attention heads of a layer")
    parser.add_argument("--seed", type=cli.natural, default=1, help="decides the weights")
    args = parser.parse_args(argv)
    from loguru import logger

    shape = ModelShape(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_layers=args.layers,
        num_heads=args.heads,
        intermediate_size=args.hidden_size,
    )
    folder, parameters = prepare(args.data, args.save_dir, shape=shape, seed=args.seed)
    logger.info(f"a model of {parameters / 1e6:.2f} million parameters; the shards are in {folder}")


def prepare(data: Path, save_dir: Path, *, shape: ModelShape, seed: int) -> tuple[Path, int]:
    """Make `<save_dir>/Quickstart/` with layer shards and the tokenizer; returns it and the number of parameters.

    UserError when `data` is missing or has too little text for the vocabulary, or sizes do not fit each other.
    """
    from openchatkit.convert import from_hf

    if not data.exists():
        raise UserError(f"no file {data}: run python data/python-docs/prepare.py first, or name a jsonl with --data")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / NAME
        parameters = write_model(source, _read_texts(data), shape=shape, seed=seed)
        return from_hf.prepare(str(source), save_dir), parameters


def write_model(folder: Path, texts: Iterable[str], *, shape: ModelShape, seed: int) -> int:
    """Write a Hugging Face folder of random weights and a tokenizer trained on `texts`; returns its parameters."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    from openchatkit.libraries import hf_transformers

    # Dimensions of a head rotate in pairs.
    unit = round(2 / shape.rotary_fraction) * shape.num_heads
    if shape.hidden_size % unit:
        raise UserError(
            f"--hidden-size {shape.hidden_size} is not a multiple of {unit} = {unit // shape.num_heads} x "
            f"--heads {shape.num_heads}: change one"
        )
    tokenizer = train(texts, shape.vocab_size)
    # Not in the signature of transformers' newer releases, which read it all the same.
    rotary: dict[str, Any] = {"rotary_pct": shape.rotary_fraction}
    config = GPTNeoXConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        **rotary,
        initializer_range=shape.init_std,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config)
    hf_transformers.silence()
    model.save_pretrained(folder)
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PADDING}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return model.num_parameters()


def _read_texts(data: Path) -> Iterator[str]:
    """Yield the texts of the first records of a file."""
    from openchatkit.data.records.document import texts

    return itertools.islice(texts(data), _TOKENIZER_RECORDS)
