"""The flags of a model and of sampling, for every command that talks to a model."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.inference.moderation import flags as moderation
from openchatkit.paths import HUGGINGFACE_MODELS

if TYPE_CHECKING:
    from openchatkit.inference.engine.sampling import Sampling
    from openchatkit.inference.responder import Responder

_DEFAULT_MODEL = HUGGINGFACE_MODELS / "GPT-NeoXT-Chat-Base-20B"
DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """Add --model and the flags of its device, precision, chat template and moderation."""
    flags.add_argument(
        "--model",
        default=str(_DEFAULT_MODEL),
        help="folder or hub name of a Hugging Face model, the folder of a training checkpoint or of a run, or one of "
        "GPT-NeoX's own; the default is the model that the original kit documents",
    )
    flags.add_argument("--gpu-id", type=cli.natural, default=0, help="the GPU to run on, where there is one")
    flags.add_argument("--dtype", choices=DTYPES, default="auto", help=_DTYPE)
    quantised = flags.add_mutually_exclusive_group()
    quantised.add_argument("--load-8bit", dest="bits", action="store_const", const=8, default=None, help=_BITS)
    quantised.add_argument("--load-4bit", dest="bits", action="store_const", const=4, default=None, help=_BITS)
    flags.add_argument("-g", "--gpu-vram", nargs="+", type=_gpu_share, metavar="ID:GiB", help=_GPU_VRAM)
    flags.add_argument("-r", "--cpu-ram", type=_gib, metavar="GiB", help=_CPU_RAM)
    flags.add_argument(
        "--threads", type=_threads, metavar="N", help="processor cores to use; torch's own choice if not given"
    )
    flags.add_argument("--no-compile", action="store_true", help="run uncompiled on a GPU: starts sooner, runs slower")
    flags.add_argument("--template", choices=("auto", "kit", "model"), default="auto", help=_TEMPLATE)
    moderation.add_flags(flags)


def add_sampling_flags(flags: argparse.ArgumentParser, *, max_tokens: int | None = 128) -> None:
    """Add --max-tokens, --seed and the other flags of sampling. `sampling` checks what the parser cannot.

    `max_tokens` is the default of --max-tokens; None leaves it to the command.
    """
    flags.add_argument("--max-tokens", type=cli.positive_int, default=max_tokens, help="the longest reply, in tokens")
    flags.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw each token by its probability; --no-sample always takes the most probable",
    )
    flags.add_argument("--temperature", type=cli.non_negative_float, default=0.6, help="0 is the same as --no-sample")
    flags.add_argument(
        "--top-k", type=cli.natural, default=40, help="draw among this many most probable tokens; 0 takes all"
    )
    for name, default, meaning in _FRACTIONS:
        flags.add_argument(name, type=cli.non_negative_float, default=default, help=meaning)
    flags.add_argument("--seed", type=_seed, help="makes the draws repeat, from the start and from each /reset")


def sampling(given: argparse.Namespace) -> "Sampling":
    """Return the settings of the flags; UserError, with the name of the flag, if one is out of range."""
    from openchatkit.inference.engine.sampling import Sampling, check

    settings = Sampling(
        max_tokens=given.max_tokens or Sampling.max_tokens,
        sample=given.sample,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
    )
    check(settings)
    return settings


def responder(given: argparse.Namespace, announce: Callable[[str], None], *, slots: int = 1) -> "Responder":
    """Load the models that the flags name; `announce` gets one line on each.

    `slots` is the number of conversations whose keys and values are kept. Raises UserError for flags out of range
    before anything is loaded, and as `loader.load`, `rendering.choose` and `moderation.flags.load_moderator` do.
    """
    sampling(given)
    import torch

    from openchatkit.inference.conversation import rendering
    from openchatkit.inference.engine.engine import Engine
    from openchatkit.inference.loading import loader
    from openchatkit.inference.responder import Responder

    loader.silence_libraries()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    moderator = moderation.load_moderator(given, announce)
    loaded = loader.load(
        given.model,
        gpu_id=given.gpu_id,
        dtype=given.dtype,
        bits=given.bits,
        gpu_gib=_shares(given.gpu_vram) if given.gpu_vram else None,
        cpu_gib=given.cpu_ram,
        announce=announce,
    )
    engine = Engine(
        loaded.model,
        eos_ids=loaded.eos_ids,
        device=loaded.device,
        cache_dtype=loaded.cache_dtype,
        slots=slots,
        compile=False if given.no_compile else None,
    )
    form = rendering.choose(given.template, loaded.tokenizer, loaded.folder)
    return Responder(engine, loaded.tokenizer, form, moderator=moderator)


_DTYPE = (
    "precision; auto is bfloat16 on a GPU that has it, else float16, and on the CPU float32 up to 100 million "
    "parameters (a billion where it has no bfloat16), bfloat16 above; int8 keeps the weights of linear layers in 8 "
    "bits: half of bfloat16's memory, and the fastest on the CPU"
)
_BITS = "quantise with bitsandbytes (pip install bitsandbytes accelerate)"
_TEMPLATE = (
    "how a chat is written for the model: kit is this kit's form, model the model's own chat template, auto the "
    "model's where it has one"
)
_FRACTIONS = (
    ("--top-p", 1.0, "draw among the fewest tokens that together reach this probability; 1 takes all"),
    ("--min-p", 0.0, "draw among tokens at least this share of the most probable one's probability; 0 takes all"),
    ("--repetition-penalty", 1.0, "above 1, makes tokens that the model has seen less probable"),
)
_GPU_VRAM = "GiB of each GPU to fill with the model, in the order of their numbers; must name --gpu-id"
_CPU_RAM = "GiB of main memory for what the GPUs do not hold; what is left stays on disk"


# Larger numbers are mistakes, on which the libraries fail.
_MOST_GIB = 1 << 20
_MOST_THREADS = 1024


def _gpu_share(text: str) -> tuple[int, float]:
    number, colon, size = text.partition(":")
    if not colon or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"expected ID:GiB such as 0:10, got {text!r}")
    return int(number), _gib(size)


def _gib(text: str) -> float:
    size = cli.non_negative_float(text)
    if not 0 < size <= _MOST_GIB:
        raise argparse.ArgumentTypeError(f"expected GiB above 0 and at most {_MOST_GIB}, got {text!r}")
    return size


def _shares(given: Sequence[tuple[int, float]]) -> dict[int, float]:
    shares = dict(given)
    if len(shares) < len(given):
        raise UserError("-g names a GPU more than once: expected one ID:GiB for each")
    return shares


def _threads(text: str) -> int:
    count = cli.positive_int(text)
    if count > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_THREADS} threads, got {text!r}")
    return count


def _seed(text: str) -> int:
    seed = cli.natural(text)
    if seed >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**63, got {text!r}")
    return seed
