"""The command `tools/upload_to_hub.py`: a model's folder to a repository of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from openchatkit import cli


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Upload a folder, and print the address of the commit."""
    parser = cli.Parser(
        prog="tools/upload_to_hub.py",
        description="Upload a model's folder to the Hugging Face hub; the token is taken from HF_TOKEN.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder, as tools/convert_to_hf_*.py makes it")
    parser.add_argument("repository", metavar="REPO", help="ORG/NAME; it is made if it is missing")
    parser.add_argument("--branch", help="the branch to commit to, made if it is missing (not given: the main one)")
    parser.add_argument("--private", action="store_true", help="make the repository one that only its members read")
    parser.add_argument("--token", action=cli.RefuseSecret, const="set HF_TOKEN", help="refused: set HF_TOKEN")
    args = parser.parse_args(argv)
    # The hub's client takes a second to import; --help need not wait for it.
    from openchatkit.download import hub_upload

    print(hub_upload.upload_folder(args.folder, args.repository, branch=args.branch, private=args.private))
