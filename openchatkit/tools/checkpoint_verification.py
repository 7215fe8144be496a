"""The command `tools/verify_checkpoint.py`: compare every byte of a run's checkpoints with their manifests.

It changes nothing, unless `--repair latest` asks for `latest` to name the newest checkpoint that is whole.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from openchatkit import cli, paths
from openchatkit.errors import UserError


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each checkpoint; UserError where one is damaged or `latest` names none that is whole.

    A repair of `latest` does not make a damaged checkpoint whole: that is an error still.
    """
    flags = _build_parser().parse_args(argv)
    # torch takes seconds to import; --help need not wait for it.
    from openchatkit.formats import checkpoint

    if flags.repair not in (None, checkpoint.LATEST):
        raise UserError(f"--repair {flags.repair}: only the file {checkpoint.LATEST} can be repaired")
    path: Path = flags.folder
    if not path.is_dir():
        raise UserError(f"{path}: no such folder: give a checkpoint, or a folder that holds some")
    if checkpoint.list_steps(path):
        roots = [path]
    elif checkpoint.is_checkpoint(path):
        if flags.repair:
            raise UserError(f"--repair latest is for the folder of a run: give {path.parent}, of which this is a part")
        if problem := _verify(path):
            raise UserError(problem)
        return
    else:
        roots = sorted(each for each in path.iterdir() if each.is_dir() and checkpoint.list_steps(each))
    if not roots:
        raise UserError(f"{path} holds no checkpoint: expected checkpoint_<step>, or a folder that holds some")
    problems = [problem for root in roots for problem in _verify_run(root, repair=flags.repair is not None)]
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}")


def _build_parser() -> cli.Parser:
    parser = cli.Parser(prog="verify_checkpoint.py", description="Compare checkpoints with their manifests.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=paths.MODEL_CKPTS,
        help="a checkpoint, a run's folder of checkpoints, or a folder of such folders",
    )
    parser.add_argument(
        "--repair",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="the file `latest`: let it name the newest checkpoint that is whole, where it names none that is",
    )
    parser.set_defaults(repair=None)
    return parser


def _verify_run(root: Path, *, repair: bool) -> list[str]:
    """Verify all checkpoints of a run, the oldest first, and return what is wrong; `repair` takes care of `latest`."""
    from openchatkit.formats import checkpoint

    found = {path: _verify(path) for step in checkpoint.list_steps(root) if (path := checkpoint.find(root, step))}
    problems = [problem for problem in found.values() if problem is not None]
    whole = [path for path, problem in found.items() if problem is None and path.exists()]
    trusted = [path for path in whole if not checkpoint.is_legacy(path)]
    named = checkpoint.read_latest(root)
    if named in whole:
        print(f"{root}: latest is {named.name}")
        return problems
    if not trusted:
        return [f"{root}: no checkpoint is whole: copy a whole one here, or move these away", *problems]
    newest = trusted[-1]
    if repair:
        step = checkpoint.parse_step(newest.name)
        assert step is not None, newest
        with checkpoint.lock_run(root):
            checkpoint.point_to(root, step)
        print(f"{root}: latest is {newest.name} from now on")
        return problems
    state = f"names {named.name}, which is damaged" if named else "names no checkpoint"
    advice = f"the newest verified checkpoint is {newest}; run this again with --repair latest to go on from it"
    print(f"{root}: latest {state}")
    return [f"{root}: latest {state}: {advice}", *problems]


def _verify(path: Path) -> str | None:
    """Print whether a checkpoint is whole; return what is wrong if it is not."""
    from openchatkit.formats import checkpoint, manifest
    from openchatkit.storage import format_bytes

    if checkpoint.is_legacy(path):
        print(f"{path}: of the original kit, which noted nothing to compare it with")
        return None
    try:
        listed = checkpoint.read_manifest(path)
        manifest.verify(path, manifest=listed)
    except manifest.DamagedError as error:
        if not path.exists():
            return None  # a run that goes on has deleted it
        print(f"{path}: DAMAGED: {error}")
        return str(error)
    print(f"{path}: whole, {format_bytes(sum(record.size for record in listed.files.values()))}")
    return None
