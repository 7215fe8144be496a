"""The command `inference/bot.py`: its flags, and a chat shell over the model that they name."""

import sys
from collections.abc import Sequence

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.inference import flags


def parser() -> cli.Parser:
    """The flags of the original kit, and those that it lacked."""
    given = cli.Parser(
        prog="inference/bot.py",
        description="Chat with a model. On a terminal this is a shell; from a pipe, each line is a question or a "
        "command, and only replies are printed.",
    )
    flags.add_model_flags(given)
    flags.add_sampling_flags(given)
    given.add_argument("--no-stream", action="store_true", help="print each reply when it is whole")
    given.add_argument("--no-date", action="store_true", help="do not open the chat with date and time")
    given.add_argument("--retrieval", action="store_true", help="not in this version yet")
    return given


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and chat until the end of input."""
    given = parser().parse_args(argv)
    if given.retrieval:
        raise UserError("--retrieval is not in this version yet: leave it out, and give passages with /passage TEXT")
    if sys.stdin is None:
        raise UserError("standard input is closed: expected a terminal, a pipe or a file to read questions from")
    responder = flags.responder(given, _announce)
    from openchatkit.inference.session import Session
    from openchatkit.inference.shell import Shell

    session = Session(responder, flags.sampling(given), date=not given.no_date, seed=given.seed)
    # Bytes that are no UTF-8 come through as lone surrogates, which the shell reports and replaces.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.stdout.reconfigure(errors="replace")
    shell = Shell(session, stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr, stream=not given.no_stream)
    shell.cmdloop()
    return shell.status


def _announce(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
