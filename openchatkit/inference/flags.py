"""The flags that say which model to load and how to draw from it, for every command that talks to a model."""

import argparse
from collections.abc import Callable

from openchatkit import cli
from openchatkit.paths import HUGGINGFACE_MODELS

DEFAULT_MODEL = HUGGINGFACE_MODELS / "GPT-NeoXT-Chat-Base-20B"


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    """--model, --gpu-id, --dtype, -g and -r: what is loaded, where to and how precise."""
    flags.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        help="folder or hub name of a Hugging Face model; the default is the one that the original kit documents",
    )
    flags.add_argument("--gpu-id", type=cli.natural, default=0, help="the GPU to run on, where there is one")
    flags.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=_DTYPE)
    flags.add_argument("-g", "--gpu-vram", nargs="+", type=_gpu_share, metavar="ID:GiB", help=_GPU_VRAM)
    flags.add_argument("-r", "--cpu-ram", type=_gib, metavar="GiB", help=_CPU_RAM)


def add_sampling_flags(flags: argparse.ArgumentParser) -> None:
    """--max-tokens, --sample, --temperature, --top-k and --seed: how replies are drawn."""
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


def sampling(given: argparse.Namespace) -> "Sampling":  # noqa: F821
    """The settings that the flags ask for."""
    from openchatkit.inference.sampling import Sampling

    return Sampling(given.max_tokens, given.sample, given.temperature, given.top_k)


def responder(given: argparse.Namespace, announce: Callable[[str], None]) -> "Responder":  # noqa: F821
    """Load the model that the flags name; `announce` is told in one line what is being loaded."""
    from openchatkit.inference import loader
    from openchatkit.inference.engine import Engine
    from openchatkit.inference.rendering import KitRendering
    from openchatkit.inference.responder import Responder

    loader.quiet()
    loaded = loader.load(
        given.model,
        gpu_id=given.gpu_id,
        dtype=given.dtype,
        gpu_gib=dict(given.gpu_vram) if given.gpu_vram else None,
        cpu_gib=given.cpu_ram,
        announce=announce,
    )
    engine = Engine(loaded.model, eos_ids=loaded.eos_ids, device=loaded.device)
    return Responder(engine, loaded.tokenizer, KitRendering(loaded.tokenizer))


_DTYPE = (
    "precision; auto is bfloat16 on a GPU that has it, else float16, and on the CPU float32 up to a billion "
    "parameters, bfloat16 above"
)
_GPU_VRAM = "GiB of each GPU to fill with the model, in the order of their numbers; must name --gpu-id"
_CPU_RAM = "GiB of main memory for what the GPUs do not hold; what is left stays on disk"


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
