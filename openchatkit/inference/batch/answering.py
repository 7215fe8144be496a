"""Answering a batch: each row is a conversation of its own, and a row that fails stops no other."""

import hashlib
from dataclasses import replace

import torch

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.inference import report
from openchatkit.inference.batch import questions
from openchatkit.inference.batch.files import BatchFiles
from openchatkit.inference.batch.questions import BatchRow
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.responder import Responder
from openchatkit.inference.retrieval.retriever import Retriever


def answer(
    batch: BatchFiles,
    responder: Responder,
    sampling: Sampling,
    *,
    seed: int | None,
    system: str,
    retriever: Retriever | None = None,
) -> None:
    """Answer the rows that have no line yet, with passages from the `retriever` if there is one.

    With a `seed`, the draws for a row depend only on it and on the row's line number, so it does not matter where a run
    was stopped. Raises KeyboardInterrupt after Ctrl-C; the next run answers the interrupted row again.
    """
    with progress.bar(batch.total, "replies", unit="row", initial=batch.done) as bar:
        for row in batch.rows():
            batch.write(row, _answer_row(row, responder, sampling, seed, system, retriever))
            bar.update()


def _answer_row(
    row: BatchRow,
    responder: Responder,
    sampling: Sampling,
    seed: int | None,
    system: str,
    retriever: Retriever | None,
) -> dict[str, object]:
    """The object of a row's reply, or of the error in its place."""
    name: dict[str, object] = {}
    text = ""
    try:
        given = questions.decode(row)
        name = {"id": given["id"]} if isinstance(given.get("id"), str | int) else {}
        asked = questions.parse_question(given, system=system)
        text = asked.conversation.turns[-1].text
        wanted = sampling if asked.max_tokens is None else replace(sampling, max_tokens=asked.max_tokens)
        generator = _generator(seed, row.number)
        reply = responder.answer(asked.conversation, wanted, retriever=retriever, generator=generator)
    except UserError as error:
        return {**name, **report.as_error(text, error)}
    if reply.finish == "interrupted":
        raise KeyboardInterrupt
    return {**name, **report.as_object(text, reply)}


def _generator(seed: int | None, line: int) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        digest = hashlib.sha256(f"{seed}:{line}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator
