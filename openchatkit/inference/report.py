"""Reports on a reply besides its text: as a JSON object for programs, as a line of figures for people."""

import json
import re
from typing import TYPE_CHECKING

from openchatkit import cli

if TYPE_CHECKING:  # these need torch, and a batch that is done does not
    from openchatkit.inference.engine.engine import Statistics
    from openchatkit.inference.responder import Reply
    from openchatkit.retrieval.passage import Passage

# JSON escapes the control characters below space by itself; a terminal executes these as well.
_EXECUTED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def as_object(question: str, reply: "Reply") -> dict[str, object]:
    """A reply as the object that --json prints; seconds are of wall clock, `dropped` counts forgotten pairs."""
    took = reply.statistics
    report: dict[str, object] = {
        "question": question,
        "reply": reply.text,
        "finish": reply.finish,
        "tokens": {"prompt": took.prompt_tokens, "cached": took.cached_tokens, "new": took.new_tokens},
        "seconds": {"first_token": round(took.first_token_seconds, 4), "total": round(took.seconds, 4)},
        "dropped": reply.dropped,
        "passages": list(reply.passages),
    }
    if reply.sources is not None:
        report["sources"] = sources(reply)
    if reply.note:
        report["note"] = reply.note
    if verdict := reply.verdict:
        report["moderation"] = {
            "allowed": verdict.allowed,
            "label": verdict.label,
            "probability": round(verdict.probability, 4),
            "action": verdict.action,
        }
    return report


def sources(reply: "Reply") -> list[dict[str, object]]:
    """The sources of a reply's passages, in the order in which the model read them, numbered from 1.

    Those that came with the question have neither title nor source; scores compare only within one reply.
    """
    return [
        {
            "number": number,
            "title": source.title,
            "source": source.source,
            "place": source.place,
            "score": round(source.score, 4),
            "text": source.text,
            **({"also": list(source.also)} if source.also else {}),
        }
        for number, source in enumerate(reply.sources or (), 1)
    ]


def citation(number: int, source: "Passage") -> str:
    """One line that is safe on a terminal: a passage's number, title, place and source, and its other places."""
    where = ", ".join(part for part in map(cli.one_line, (source.title, source.place, source.source)) if part)
    also = f" (also {'; '.join(map(cli.one_line, source.also))})" if source.also else ""
    return f"[{number}] {where or 'given with the question'}{also}"


def as_error(question: str, error: Exception) -> dict[str, object]:
    """The object that takes the place of a reply that failed."""
    return {"question": question, "error": " ".join(str(error).split())}


def to_json(report: dict[str, object]) -> str:
    """One line of JSON in UTF-8 that is safe on a terminal too."""
    # Half of a surrogate pair cannot be written as UTF-8.
    text = json.dumps(report, ensure_ascii=False).encode("utf-8", "replace").decode()
    return _EXECUTED.sub(lambda found: f"\\u{ord(found.group()):04x}", text) + "\n"


def figures(took: "Statistics") -> str:
    """One line: tokens, tokens a second after the first, the wait for the first, the cached share of the prompt."""
    parts = [count(took.new_tokens, "token")]
    if took.new_tokens > 1 and took.seconds > took.first_token_seconds:
        # The first token waits for the prompt to be read; the speed of the others is another figure.
        parts.append(f"{(took.new_tokens - 1) / (took.seconds - took.first_token_seconds):.1f} tokens/s")
    parts.append(f"the first after {took.first_token_seconds:.2f} s")
    if took.prompt_tokens:
        share = 100 * took.cached_tokens / took.prompt_tokens
        parts.append(f"{count(took.prompt_tokens, 'token')} of prompt, {share:.0f} % of them kept from before")
    if took.drafted_tokens:
        parts.append(f"{took.accepted_tokens} of {took.drafted_tokens} guessed tokens right")
    return ", ".join(parts)


def sums(took: "Statistics") -> str:
    """One line on all replies together."""
    speed = f" ({took.new_tokens / took.seconds:.1f} tokens/s, reading included)" if took.seconds > 0 else ""
    share = f" ({100 * took.cached_tokens / took.prompt_tokens:.0f} %)" if took.prompt_tokens else ""
    return (
        f"{count(took.new_tokens, 'token')} in {took.seconds:.1f} s{speed}; prompts of "
        f"{count(took.prompt_tokens, 'token')}, {took.cached_tokens} of them kept from before{share}"
    )


def count(number: int, what: str) -> str:
    """A number and its noun, as people write it."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
