"""The command `retrieval/build_index.py`: its subcommands, their flags and their output."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.formats.retrieval_index import IndexRecord
from openchatkit.retrieval import report
from openchatkit.retrieval.building import operations, ranks
from openchatkit.retrieval.index import Index, verify
from openchatkit.retrieval.reading import reader
from openchatkit.retrieval.rerank import DEPTH, Reranker

if TYPE_CHECKING:
    from openchatkit.retrieval.evaluation import EvaluationQuestion

_SHOWN = 10  # excluded files that are listed


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand."""
    given = build_parser().parse_args(argv)
    given.run(given)


def build_parser() -> cli.Parser:
    """Return the parser of the subcommands and their flags."""
    whole = cli.Parser(
        prog="retrieval/build_index.py",
        description="Make an index of your own files, keep it up to date with them, search it, and measure how well "
        f"it finds passages. Files are read by their endings: {', '.join(reader.READABLE)}, source code, and names "
        "without an ending; plain text also as .gz.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    for name, run, text in (
        ("add", _add, "add files or folders to an index"),
        ("delete", _delete, "remove files or folders from an index; the files themselves stay"),
    ):
        command = _subcommand(commands, name, run, text)
        command.add_argument("paths", nargs="+", metavar="PATH", help="files, or folders with everything in them")
        if name == "add":
            _device(command)
    _device(_subcommand(commands, "update", _update, "read changed files again, and remove those that are gone"))
    _add_search(commands)
    command = _subcommand(commands, "info", _info, "show what an index holds and how it was made")
    command.add_argument("--verify", action="store_true", help="hash every file, and compare with the manifest")
    command.add_argument("--sources", action="store_true", help="list the sources")
    command.add_argument("--skipped", action="store_true", help="list the excluded files, and why")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_evaluate(commands)
    return whole


def _add_build(commands: "argparse._SubParsersAction[cli.Parser]") -> None:
    command = _subcommand(commands, "build", _build, "make an index of files; run again, it resumes or updates")
    command.add_argument("paths", nargs="+", metavar="PATH", help="files, or folders with everything in them")
    _device(command)
    command.add_argument(
        "--encoder",
        metavar="NAME",
        help=f"folder or hub name of a sentence encoder, or `{operations.NO_ENCODER}` to search by words alone; a new "
        f"index has {operations.DEFAULT_ENCODER} by default",
    )
    group = command.add_argument_group("how files become passages (chosen when an index is made, and kept)")
    group.add_argument("--chunk-tokens", dest="tokens", type=cli.positive_int, help="longest passage; by default 200")
    group.add_argument(
        "--overlap", type=cli.natural, help="tokens that a passage repeats of the previous one; by default 30"
    )
    group.add_argument("--text-field", metavar="NAME", help="field or column that holds the text of a row")
    group.add_argument("--title-field", metavar="NAME", help="field or column that holds its title")
    group.add_argument("--source-field", metavar="NAME", help="field or column that holds its address")
    group.add_argument(
        "--max-bytes", type=cli.positive_int, help="of a file that is not plain text; by default 67108864"
    )
    group.add_argument("--max-pages", type=cli.positive_int, help="of a PDF file; by default 5000")
    group.add_argument(
        "--include-ignored",
        action="store_true",
        default=None,
        help="also read what .gitignore names, node_modules and virtual environments",
    )


def _add_search(commands: "argparse._SubParsersAction[cli.Parser]") -> None:
    command = _subcommand(commands, "search", _search, "find passages for a question")
    command.add_argument("query", help="the question")
    command.add_argument("-k", type=cli.positive_int, default=5, help="passages to find")
    command.add_argument(
        "--mode", choices=("fused", "dense", "sparse"), default="fused", help="by meaning, words, both"
    )
    command.add_argument("--no-floor", action="store_true", help="show the nearest passages even if they are far")
    command.add_argument("--json", action="store_true", help="print JSON")
    _reranker(command)
    _device(command)


def _add_evaluate(commands: "argparse._SubParsersAction[cli.Parser]") -> None:
    command = _subcommand(commands, "evaluate", _evaluate, "measure recall, MRR, nDCG and times of a search")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--queries", type=Path, metavar="FILE", help='rows {"query": ..., "source": ...} about the index')
    what.add_argument(
        "--set",
        nargs="+",
        metavar=("NAME", "WHEEL"),
        help="a built-in set, of which --index is made: `awscli WHEEL`, examples in a wheel of awscli; or `stdlib`",
    )
    command.add_argument("--encoder", metavar="NAME", help=f"for --set; by default {operations.DEFAULT_ENCODER}")
    command.add_argument("--questions", type=cli.positive_int, default=500, help="of a set, drawn by --seed")
    command.add_argument("--seed", type=cli.natural, default=0, help="for drawing the questions")
    command.add_argument("--json", action="store_true", help="print JSON")
    _reranker(command)
    _device(command)


def _subcommand(commands: "argparse._SubParsersAction[cli.Parser]", name: str, run: object, text: str) -> cli.Parser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.add_argument("--index", type=Path, required=True, metavar="DIR", help="folder of the index")
    command.set_defaults(run=run)
    return command


def _device(command: cli.Parser) -> None:
    command.add_argument(
        "--device",
        default="auto",
        help="where texts are embedded and, if faiss has GPUs, searched: auto, cpu, cuda, cuda:1, mps",
    )


def _reranker(command: cli.Parser) -> None:
    command.add_argument(
        "--reranker", metavar="NAME", help=f"folder or hub name of a cross-encoder that reorders the best {DEPTH}"
    )


def _build(given: argparse.Namespace) -> None:
    settings = {name: getattr(given, name) for name in asdict(operations.BuildSettings())}
    with ranks.join() as all_ranks, _silence_all_but_first(all_ranks):
        operations.build(
            given.paths, given.index, encoder=given.encoder, device=given.device, settings=settings, ranks=all_ranks
        )
        _report_skipped(given.index, all_ranks)


def _add(given: argparse.Namespace) -> None:
    with ranks.join() as all_ranks, _silence_all_but_first(all_ranks):
        operations.add(given.paths, given.index, device=given.device, ranks=all_ranks)
        _report_skipped(given.index, all_ranks)


def _update(given: argparse.Namespace) -> None:
    with ranks.join() as all_ranks, _silence_all_but_first(all_ranks):
        operations.update(given.index, device=given.device, ranks=all_ranks)
        _report_skipped(given.index, all_ranks)


def _delete(given: argparse.Namespace) -> None:
    operations.delete(given.paths, given.index)


def _search(given: argparse.Namespace) -> None:
    with Index.open(given.index, device=given.device) as index:
        if given.device.startswith("cuda"):  # not by default for one question, since the index is copied there
            index.to_gpus()
        count = DEPTH if given.reranker else given.k
        hits = index.search(given.query, count, mode=given.mode, score_threshold=not given.no_floor)
        if given.reranker:
            hits = Reranker(given.reranker, given.device).rerank(given.query, hits, given.k)
    if given.json:
        report.print_json([asdict(hit) for hit in hits])
    elif hits:
        report.print_hits(hits)
    else:
        print("nothing in the index is about that (--no-floor shows the nearest anyway)", file=sys.stderr)


def _info(given: argparse.Namespace) -> None:
    if given.verify:
        verify(given.index)
    with Index.open(given.index) as index:
        about = index.info()
        record = index.record
    if given.sources:
        about["sources"] = [asdict(each) for each in layout.read_sources(given.index, record)]
    if given.skipped:
        about["skipped"] = [asdict(each) for each in layout.read_skipped(given.index, record)]
    if given.verify:
        about["verified"] = True
    report.print_json(about) if given.json else report.print_info(about)


def _evaluate(given: argparse.Namespace) -> None:
    from openchatkit.retrieval import evaluation

    if given.queries:
        if given.encoder:
            raise UserError("--encoder goes with --set: an index is searched with the encoder that it was made with")
        questions = evaluation.read_questions(given.queries)
    else:
        questions = _make_set(given)
    reranker = Reranker(given.reranker, given.device) if given.reranker else None
    with Index.open(given.index, device=given.device) as index:
        index.to_gpus()
        figures = evaluation.evaluate(index, questions, reranker=reranker)
        about = f"{len(questions):,} questions, {index.record.rows:,} passages"
    if given.json:
        report.print_json({name: asdict(each) for name, each in figures.items()})
    else:
        print(f"{about}; times are those of 50 % and 99 % of the questions\n\n{evaluation.table(figures)}")


def _make_set(given: argparse.Namespace) -> "list[EvaluationQuestion]":
    """Make --index of a set, unless it is that already; return the questions about it."""
    from openchatkit.retrieval import question_sets

    match given.set:
        case ["awscli", wheel]:
            examples = question_sets.awscli(Path(wheel))
        case ["stdlib"]:
            examples = question_sets.stdlib()
        case _:
            raise UserError(f"--set {' '.join(given.set)}: expected `awscli WHEEL` or `stdlib`")
    source = question_sets.source(given.set[0], examples)
    operations.build_rows(
        source, given.index, encoder=given.encoder, device=given.device, max_tokens=question_sets.TOKENS
    )
    return question_sets.questions(examples, count=given.questions, seed=given.seed)


@contextlib.contextmanager
def _silence_all_but_first(all_ranks: ranks.Ranks) -> Iterator[None]:
    """Let only the first process log."""
    if not all_ranks.first:
        logger.remove()
    yield


def _report_skipped(folder: Path, all_ranks: ranks.Ranks) -> None:
    """List the excluded files, on the first of several processes."""
    if not all_ranks.first:
        return
    record: IndexRecord = layout.read(folder)[0]
    report.print_skipped(layout.read_skipped(folder, record), _SHOWN)
