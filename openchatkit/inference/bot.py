"""The command `inference/bot.py`: its flags, and a chat shell, one question, or a batch."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli, progress
from openchatkit.errors import UserError
from openchatkit.formats import chat_file
from openchatkit.inference import flags
from openchatkit.inference.retrieval import flags as retrieval

if TYPE_CHECKING:
    from openchatkit.inference.session import Session

# Flags that change how replies are shown, or how fast they come, and not their text.
_PRESENTATION = (
    *("batch", "output", "json", "verbose", "no_stream", "no_date", "prompt", "load"),
    *("gpu_id", "gpu_vram", "cpu_ram", "threads", "no_compile", "moderation_gpu_id"),
    *("retrieval_device", "retrieval_encoder", "no_citations"),
)


def parser() -> cli.Parser:
    """Return the parser of the original kit's flags and of the new ones."""
    given = cli.Parser(
        prog="inference/bot.py",
        description="Chat with a model. On a terminal this is a shell; from a pipe, each line is a question or a "
        "command, and only replies are printed. --prompt asks one question, --batch a file of them.",
    )
    flags.add_model_flags(given)
    flags.add_sampling_flags(given)
    given.add_argument("--system", type=cli.text, metavar="TEXT", help="open the conversation with this text")
    given.add_argument("--load", metavar="NAME", help="go on with a saved chat; see /save and /chats")
    given.add_argument(
        "--prompt", type=cli.text, metavar="TEXT", help="ask this and leave; piped text goes with it as a passage"
    )
    given.add_argument("--batch", metavar="IN.jsonl", help="answer each row of a file by itself; - is standard input")
    given.add_argument("--output", metavar="OUT.jsonl", help="where the replies of --batch go; - is standard output")
    given.add_argument("--json", action="store_true", help="print each reply as a JSON object on one line")
    given.add_argument("--verbose", action="store_true", help="print tokens, tokens/s and seconds after each reply")
    given.add_argument("--no-stream", action="store_true", help="print each reply when it is whole")
    given.add_argument("--no-date", action="store_true", help="do not open the chat with date and time")
    retrieval.add_flags(given)
    given.add_argument("--no-citations", action="store_true", help="do not list a reply's sources after it")
    return given


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Load the model and chat until the end of input, or answer what the flags give."""
    given = parser().parse_args(argv)
    _check(given)
    # Bytes that are not UTF-8 become lone surrogates, which the shell reports and replaces.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="replace", encoding="utf-8" if given.json or given.batch else None)
    if given.batch:
        return _batch(given)
    return _chat(given)


def _check(given: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together, before a model is loaded."""
    if given.batch and not given.output:
        raise UserError("--batch needs --output OUT.jsonl for its replies, or --output - for standard output")
    if given.output and not given.batch:
        raise UserError("--output is where the replies of --batch go: expected --batch IN.jsonl with it")
    if given.batch and (given.prompt is not None or given.load):
        raise UserError("--batch answers each row by itself: leave out --prompt and --load")
    if given.prompt is not None and not given.prompt.strip():
        raise UserError("--prompt is empty: expected a question")
    if sys.stdin is None and given.prompt is None and given.batch in (None, "-"):
        raise UserError("standard input is closed: expected a terminal, a pipe or a file to read questions from")
    if given.load:
        chat_file.read(given.load)


def _chat(given: argparse.Namespace) -> int:
    from openchatkit.inference.shell.commands import Shell
    from openchatkit.inference.shell.line_reader import read_passage
    from openchatkit.inference.shell.output import Output

    asked = given.prompt is not None
    output = Output(
        sys.stdout,
        sys.stderr,
        interactive=not asked and sys.stdin.isatty(),
        stream=not given.no_stream,
        as_json=given.json,
        verbose=given.verbose,
        citations=not given.no_citations,
    )
    if output.interactive and (fault := chat_file.unwritable_reason()):
        output.note(
            f"chats cannot be saved, and what is typed is not kept for later: {fault}; {chat_file.HOME_VARIABLE} names "
            "another folder"
        )
    passages = read_passage(sys.stdin, output) if asked else []
    session = _session(given)
    shell = Shell(session, output, stdin=sys.stdin, stdout=sys.stdout, about=_about(given, session))
    if asked:
        shell.ask(given.prompt, passages)
    else:
        shell.cmdloop()
    return output.status


def _batch(given: argparse.Namespace) -> int:
    from openchatkit.inference.batch.files import BatchFiles

    settings = {name: value for name, value in vars(given).items() if name not in _PRESENTATION}
    settings["retrieval"] = retrieval.contents_digest(given)
    with BatchFiles(given.batch, given.output, settings) as batch:
        if not batch.finished:
            from openchatkit.inference.batch.answering import answer

            session = _session(given)
            answer(
                batch,
                session.responder,
                session.sampling,
                seed=given.seed,
                system=given.system or "",
                retriever=session.retriever,
            )
        batch.conclude()
    return 0


def _session(given: argparse.Namespace) -> "Session":
    retriever = retrieval.retriever(given, progress.announce)
    responder = flags.responder(given, progress.announce)
    from openchatkit.inference.session import Session

    session = Session(
        responder,
        flags.sampling(given),
        date=not given.no_date,
        seed=given.seed,
        retriever=retriever,
        model=Path(given.model).name,
    )
    if given.load:
        session.load(given.load)
    if given.system is not None:
        session.system = given.system
    return session


def _about(given: argparse.Namespace, session: "Session") -> str:
    """Return one line on the loaded model. Device and dtype were already announced."""
    responder = session.responder
    length = responder.engine.context_length
    reads = "" if length is None else f", reads {length:,} tokens at once"
    form = "the kit's form" if responder.rendering.name == "kit" else "its own chat template"
    judged = "" if responder.moderator is None else f", moderated by {given.moderation_model}"
    return f"{given.model}{reads}, in {form}{judged}"
