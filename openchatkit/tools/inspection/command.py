"""`tools/inspect_data.py`: show the data that training would use, or prove which data it used.

`sampled` reads samples, `figures` computes the numbers of the sources, `terminal` and `page` show both, and
`verification` is the proof.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from openchatkit import cli
from openchatkit.data import options
from openchatkit.errors import UserError
from openchatkit.settings import add_flags, fields

_DRAW = 256  # samples of each source from which its share of the loss is estimated
_ENDS = 150  # tokens at either end of a sample that is shortened
_ROWS = 5  # rows shown of those set aside
_WITH_VERIFY = ("verify", "checkpoint_path", "tokenizer_name", "data_cache")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Show samples and the mixture, or verify a run's ledger."""
    args = _parse(argv)
    if args.verify:
        _verify(args)
    else:
        _inspect(args)


def _inspect(args: argparse.Namespace) -> None:
    # torch takes seconds to import; --help and mistakes in the flags need not wait for it.
    from openchatkit.data.dataset import build_dataset
    from openchatkit.data.tokenizer import Tokenizer
    from openchatkit.storage import storage_errors
    from openchatkit.tools.inspection import figures, page, sampled, terminal

    data_options = options.from_settings(vars(args))
    tokenizer = Tokenizer(data_options.tokenizer)
    dataset = build_dataset(args.task_name, data_options)
    steps = args.total_steps or math.ceil(dataset.epoch_samples / args.batch_size)
    mixture = figures.mixture(dataset, data_options, steps=steps, batch_size=args.batch_size, draw=_DRAW)
    quarantines = list(figures.quarantines(dataset, first=_ROWS))
    numbers: Sequence[int] = range(args.first or 0, (args.first or 0) + args.samples)
    if args.first is None:
        numbers = sampled.choose(dataset, mixture.samples, args.samples, seed=args.seed)
    out = terminal.console()
    terminal.show_mixture(out, mixture)
    terminal.show_quarantines(out, quarantines)
    ends = None if args.full else _ENDS
    terminal.show_samples(out, [sampled.read_sample(dataset, n, tokenizer, ends=ends) for n in numbers])
    if args.html:
        whole = [sampled.read_sample(dataset, n, tokenizer) for n in numbers]
        with storage_errors(args.html):
            page.write(args.html, mixture, quarantines, whole)
        terminal.note(out, f"\n{args.html} shows the same as a page")


def _verify(args: argparse.Namespace) -> None:
    from openchatkit.tools.inspection import terminal, verification

    cache_dir = args.data_cache if "data_cache" in args.given else None
    proof = verification.verify(args.checkpoint_path, tokenizer=args.tokenizer_name, cache_dir=cache_dir)
    terminal.show_proof(terminal.console(), proof)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags; `given` holds the names of those that were given."""
    parser = _parser()
    unset = object()
    empty = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), unset))
    given = {name for name, value in vars(parser.parse_args(argv, empty)).items() if value is not unset}
    args = parser.parse_args(argv)
    args.given = given
    if args.verify:
        if not args.checkpoint_path:
            raise UserError("--verify needs --checkpoint-path, the folder that training wrote its checkpoints to")
        for name in sorted(given.difference(_WITH_VERIFY)):
            raise UserError(
                f"{_flag(name)} does not go with --verify, which takes it from the checkpoint: leave it out"
            )
    else:
        if args.checkpoint_path:
            raise UserError("--checkpoint-path goes with --verify alone: give both, or neither")
        for name in ("task_name", "tokenizer_name"):
            if not getattr(args, name):
                raise UserError(f"{_flag(name)} is missing: give the one that training is given")
        if args.html and args.html.is_dir():
            raise UserError(f"--html {args.html} is a folder: give the file to write, {args.html / 'page.html'} say")
    return args


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="tools/inspect_data.py",
        description="Show what training would be given: samples, with the tokens that are trained on, and the "
        "mixture's figures. With --verify, prove that a run trained on each sample exactly once.",
    )
    parser.add_argument("--task-name", help="the data, as training takes it: name[:weight],name[:weight]")
    parser.add_argument("--tokenizer-name", type=Path, help="folder with the tokenizer")
    add_flags(parser.add_argument_group("data, as in training"), fields(options.DataSettings))
    show = parser.add_argument_group("what to show")
    show.add_argument(
        "--total-steps", type=cli.positive_int, help="steps that the figures are for; one epoch unless given"
    )
    show.add_argument("--batch-size", type=cli.positive_int, default=32, help="sequences a step, over all replicas")
    show.add_argument("--samples", type=cli.natural, default=3, help="how many samples to show")
    show.add_argument("--first", type=cli.natural, help="number of the first of them; drawn by --seed unless given")
    show.add_argument("--full", action="store_true", help="show long samples whole")
    show.add_argument("--html", type=Path, help="write the same as a page, too")
    proof = parser.add_argument_group("proof")
    proof.add_argument("--verify", action="store_true", help="compare a run's ledger with the data")
    proof.add_argument("--checkpoint-path", type=Path, help="the run's checkpoints, or one of them")
    return parser


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
