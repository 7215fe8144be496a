"""The commands that fetch data: `data/OIG`, `data/OIG-moderation`, and `data/prepare_data.py` for everything else.

How files come and are checked is up to `download.sources`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from loguru import logger

from openchatkit import cli, paths, progress
from openchatkit.download.sources import fetch_dataset, fetch_source

OIG, MODERATION = "laion/OIG", "ontocord/OIG-moderation"
_AGAIN = (
    "Every file is checked against the hub's digest before it gets its name. What is there already is not fetched "
    "again, and a download that was cut short goes on where it stopped. HF_TOKEN, if set, is the account used."
)
_SOURCES = """\
sources:
  ORG/NAME, https://huggingface.co/datasets/ORG/NAME   a data set of the Hugging Face hub; HF_TOKEN for a private one
  https://huggingface.co/datasets/ORG/NAME/resolve/main/FILE   one file of it
  https://github.com/ORG/NAME                          a repository's newest commit, without what git LFS keeps
  https://host/file, https://host/file#sha256=HEX      a file, checked against its SHA-256 if that is given
  s3://bucket/key, s3://bucket/folder/                 an object, or all below a folder: AWS_ACCESS_KEY_ID,
                                                       AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL if not Amazon's
  a path                                               a file or folder on this machine, which is copied
"""


def dataset_command(folder: str, name: str, size: str, *, everything: str) -> Callable[..., None]:
    """Return the command of a `data/<folder>/prepare.py`, which fetches files of the data set `name` to `files/`.

    `everything` is the glob of the files that are fetched when none is named.
    """

    @cli.command
    def main(argv: Sequence[str] | None = None) -> None:
        parser = cli.Parser(
            prog=f"data/{folder}/prepare.py",
            description=f"Fetch {name} from the Hugging Face hub into data/{folder}/files/. {size} {_AGAIN}",
        )
        parser.add_argument(
            "--files",
            nargs="+",
            default=argparse.SUPPRESS,
            metavar="NAME",
            help="only these files: names, with or without their endings, or globs such as 'unified_s*'; without this "
            "flag, all",
        )
        wanted = getattr(parser.parse_args(argv), "files", [everything])
        _print(fetch_dataset(name, wanted, paths.ROOT / "data" / folder / "files"))

    return main


@cli.command
def prepare_data(argv: Sequence[str] | None = None) -> None:
    """Run the command `data/prepare_data.py`."""
    parser = cli.Parser(
        prog="data/prepare_data.py",
        description="Fetch data from wherever it is into a folder, and unpack .gz, .zst and tar there. What is\n"
        "there already is not fetched again; a download that was cut short goes on where it stopped.",
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-s", "--data-source", required=True, metavar="SOURCE", help="what to fetch, see below")
    parser.add_argument("-d", "--dest", required=True, type=Path, metavar="FOLDER", help="where to put it")
    parser.add_argument("--keep-packed", action="store_true", help="leave packed files as they are")
    parser.add_argument("--debug", action="store_true", help="log every request, never with keys or tokens")
    for short, flag, variable in (
        ("-a", "--access-key-id", "AWS_ACCESS_KEY_ID"),
        ("-k", "--secret-access-key", "AWS_SECRET_ACCESS_KEY"),
    ):
        text = f"refused: other users see command lines; set {variable} instead"
        advice = f"set {variable} in the environment instead, and change the key if it was typed here"
        parser.add_argument(short, flag, nargs="?", action=cli.RefuseSecret, const=advice, help=text)
    args = parser.parse_args(argv)
    if args.debug:
        logger.remove()
        logger.add(progress.write, format="{message}", level="DEBUG", filter="openchatkit")
    _print(fetch_source(args.data_source, args.dest, keep_packed=args.keep_packed))


def _print(files: Sequence[Path]) -> None:
    for path in files:
        print(path)
