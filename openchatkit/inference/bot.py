"""The command `inference/bot.py`: its flags, and a chat shell over the model that they name."""

import argparse
import sys
from collections.abc import Sequence

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.paths import HUGGINGFACE_MODELS

DEFAULT_MODEL = HUGGINGFACE_MODELS / "GPT-NeoXT-Chat-Base-20B"


def parser() -> cli.Parser:
    """The flags of the original kit, and those that it lacked."""
    flags = cli.Parser(
        prog="inference/bot.py",
        description="Chat with a model. On a terminal this is a shell; from a pipe, each line is a question or a "
        "command, and only replies are printed.",
    )
    flags.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        help="folder or hub name of a Hugging Face model; the default is the one that the original kit documents",
    )
    flags.add_argument("--gpu-id", type=cli.natural, default=0, help="the GPU to run on, where there is one")
    flags.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=_DTYPE)
    flags.add_argument("-g", "--gpu-vram", nargs="+", type=_gpu_share, metavar="ID:GiB", help=_GPU_VRAM)
    flags.add_argument("-r", "--cpu-ram", type=_gib, metavar="GiB", help=_CPU_RAM)
    flags.add_argument("--max-tokens", type=cli.positive_int, default=128, help="the longest reply, in tokens")
    flags.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw each token by its probability; --no-sample always takes the most probable",
    )
    flags.add_argument("--temperature", type=cli.non_negative_float, default=0.6, help="0 is the same as --no-sample")
    flags.add_argument("--top-k", type=cli.positive_int, default=40, help="draw among this many most probable tokens")
    flags.add_argument("--seed", type=_seed, help="makes the draws repeat, from the start and from each /reset")
    flags.add_argument("--no-stream", action="store_true", help="print each reply when it is whole")
    flags.add_argument("--no-date", action="store_true", help="do not open the chat with date and time")
    flags.add_argument("--retrieval", action="store_true", help="not in this version yet")
    return flags


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and chat until the end of input."""
    given = parser().parse_args(argv)
    if given.retrieval:
        raise UserError("--retrieval is not in this version yet: leave it out, and give passages with /passage TEXT")
    if sys.stdin is None:
        raise UserError("standard input is closed: expected a terminal, a pipe or a file to read questions from")
    from openchatkit.inference import loader
    from openchatkit.inference.engine import Engine, Sampling
    from openchatkit.inference.session import Session
    from openchatkit.inference.shell import Shell

    loader.quiet()
    loaded = loader.load(
        given.model,
        gpu_id=given.gpu_id,
        dtype=given.dtype,
        gpu_gib=dict(given.gpu_vram) if given.gpu_vram else None,
        cpu_gib=given.cpu_ram,
        announce=_announce,
    )
    session = Session(
        Engine(loaded.model, eos_ids=loaded.eos_ids, device=loaded.device),
        loaded.tokenizer,
        Sampling(given.max_tokens, given.sample, given.temperature, given.top_k),
        date=not given.no_date,
        seed=given.seed,
    )
    # Bytes that are no UTF-8 come through as lone surrogates, which the shell reports and replaces.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.stdout.reconfigure(errors="replace")
    shell = Shell(session, stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr, stream=not given.no_stream)
    shell.cmdloop()
    return shell.status


_DTYPE = (
    "precision; auto is bfloat16 on a GPU that has it, else float16, and on the CPU float32 up to a billion "
    "parameters, bfloat16 above"
)
_GPU_VRAM = "GiB of each GPU to fill with the model, in the order of their numbers; must name --gpu-id"
_CPU_RAM = "GiB of main memory for what the GPUs do not hold; what is left stays on disk"


def _announce(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def _gpu_share(text: str) -> tuple[int, float]:
    number, colon, size = text.partition(":")
    if not colon or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"expected ID:GiB such as 0:10, got {text!r}")
    return int(number), _gib(size)


def _gib(text: str) -> float:
    size = cli.non_negative_float(text)
    if size == 0:
        raise argparse.ArgumentTypeError(f"expected GiB above 0, got {text!r}")
    return size


def _seed(text: str) -> int:
    seed = cli.natural(text)
    if seed >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**63, got {text!r}")
    return seed
