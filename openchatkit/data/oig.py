"""The command `data/OIG/prepare.py`: the Open Instruction Generalist data set, or the files of it that are named."""

import argparse
from collections.abc import Sequence

from openchatkit import cli, paths
from openchatkit.download import fetch_dataset

DATASET = "laion/OIG"


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Fetch and say where the files are."""
    parser = cli.Parser(
        prog="data/OIG/prepare.py",
        description=f"Fetch {DATASET} from the Hugging Face hub into data/OIG/files/. All of it is 172 GB. What is "
        "there already is not fetched again, and a download that was cut short goes on where it stopped.",
    )
    parser.add_argument(
        "--files",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="only these files: names, with or without their endings, or globs, for example unified_ni 'unified_s*'; "
        "without this flag, all",
    )
    wanted = getattr(parser.parse_args(argv), "files", [])
    files = fetch_dataset(DATASET, wanted, paths.ROOT / "data" / "OIG" / "files")
    for path in files:
        print(path)
