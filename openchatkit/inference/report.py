"""What is told of a reply besides its text: as an object of JSON for programs, as a line of figures for people."""

import json
import re
from typing import TYPE_CHECKING

from openchatkit import cli

if TYPE_CHECKING:  # both need torch, and a batch that is done does not
    from openchatkit.inference.engine.engine import Statistics
    from openchatkit.inference.responder import Reply
    from openchatkit.retrieval.passage import Passage

# JSON escapes the control characters below space by itself; a terminal obeys these as well.
_OBEYED = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def as_object(question: str, reply: "Reply") -> dict[str, object]:
    """A reply as the object that --json prints; seconds are of wall clock, `dropped` counts forgotten pairs."""
    took = reply.statistics
    told: dict[str, object] = {
        "question": question,
        "reply": reply.text,
        "finish": reply.finish,
        "tokens": {"prompt": took.prompt_tokens, "cached": took.cached_tokens, "new": took.new_tokens},
        "seconds": {"first_token": round(took.first_token_seconds, 4), "total": round(took.seconds, 4)},
        "dropped": reply.dropped,
        "passages": list(reply.passages),
    }
    if reply.sources is not None:
        told["sources"] = sources(reply)
    if reply.note:
        told["note"] = reply.note
    if verdict := reply.verdict:
        told["moderation"] = {
            "allowed": verdict.allowed,
            "label": verdict.label,
            "probability": round(verdict.probability, 4),
            "action": verdict.action,
        }
    return told


def sources(reply: "Reply") -> list[dict[str, object]]:
    """Where the passages of a reply are from, in the order in which the model read them, numbered from 1.

    Those that came with the question have neither title nor source; `score` means something within one reply alone.
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
    """One line that is safe on a terminal: a passage's number, title, place and source, and where else it stands."""
    where = ", ".join(part for part in map(cli.one_line, (source.title, source.place, source.source)) if part)
    also = f" (also {'; '.join(map(cli.one_line, source.also))})" if source.also else ""
    return f"[{number}] {where or 'given with the question'}{also}"


def as_error(question: str, error: Exception) -> dict[str, object]:
    """What stands in the place of a reply that did not come."""
    return {"question": question, "error": " ".join(str(error).split())}


def to_json(told: dict[str, object]) -> str:
    """One line of JSON in UTF-8 that is safe on a terminal too."""
    # Half of a surrogate pair cannot be written as UTF-8; nothing that was said holds one.
    text = json.dumps(told, ensure_ascii=False).encode("utf-8", "replace").decode()
    return _OBEYED.sub(lambda found: f"\\u{ord(found.group()):04x}", text) + "\n"


def figures(took: "Statistics") -> str:
    """One line: tokens, tokens a second behind the first, the wait for the first, what of the prompt was kept."""
    parts = [count(took.new_tokens, "token")]
    if took.new_tokens > 1 and took.seconds > took.first_token_seconds:
        # The first token waits for the prompt to be read; how fast the others come is another figure.
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
    """So many of something, as people write it."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
