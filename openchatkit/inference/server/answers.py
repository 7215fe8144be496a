"""What a client is answered: the objects of OpenAI's API, made from replies."""

import secrets
import time

from openchatkit.inference import report
from openchatkit.inference.responder import Reply

# An interrupted reply has no reason here: it becomes an error.
_FINISH = {"end": "stop", "length": "length", "moderated": "content_filter"}


def model(name: str, created: int) -> dict[str, object]:
    """A model, as /v1/models lists it; `created` in seconds since 1970."""
    return {"id": name, "object": "model", "created": created, "owned_by": "openchatkit"}


def usage(reply: Reply) -> dict[str, object]:
    """What a reply took, in tokens; `dropped_pairs`, ours, counts old questions that did not fit any more."""
    taken = reply.statistics
    counts: dict[str, object] = {
        "prompt_tokens": taken.prompt_tokens,
        "completion_tokens": taken.new_tokens,
        "total_tokens": taken.prompt_tokens + taken.new_tokens,
        "prompt_tokens_details": {"cached_tokens": taken.cached_tokens},
    }
    return {**counts, "dropped_pairs": reply.dropped} if reply.dropped else counts


def _sources(reply: Reply) -> dict[str, object]:
    """`sources`, ours: where the passages of a reply are from, if any were looked for; `note`, if that failed.

    Why it failed is for whoever runs the server: it may name their folders.
    """
    if reply.sources is None:
        return {}
    note = {"note": "passages are missing: the server's log says why"} if reply.note else {}
    return {"sources": report.sources(reply), **note}


class Answer:
    """One answer, whole or in chunks, to a chat or to a plain completion."""

    def __init__(self, name: str, *, chat: bool, include_usage: bool = False) -> None:
        self._chat = chat
        self._usage = include_usage
        self._common = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, reply: Reply) -> dict[str, object]:
        """The answer as one object."""
        content = {"message": {"role": "assistant", "content": reply.text, "refusal": None}}
        choice = self._choice(content if self._chat else {"text": reply.text}, _FINISH[reply.finish])
        return {**self._common, "choices": [choice], "usage": usage(reply), **_sources(reply)}

    def opening(self) -> list[dict[str, object]]:
        """What comes before any text."""
        return [self._chunk({"role": "assistant", "content": ""})] if self._chat else []

    def piece(self, text: str) -> dict[str, object]:
        """More text."""
        return self._chunk({"content": text} if self._chat else text)

    def closing(self, reply: Reply) -> list[dict[str, object]]:
        """What comes after all text."""
        last = self._chunk({} if self._chat else "", _FINISH[reply.finish])
        chunks = [{**last, **_sources(reply)}]
        if self._usage:
            chunks.append({**last, "choices": [], "usage": usage(reply)})
        return chunks

    def _chunk(self, content: object, finish: str | None = None) -> dict[str, object]:
        choice = self._choice({"delta" if self._chat else "text": content}, finish)
        chunk = {**self._common, "choices": [choice]}
        if self._chat:
            chunk["object"] = "chat.completion.chunk"
        return {**chunk, "usage": None} if self._usage else chunk

    def _choice(self, content: dict[str, object], finish: str | None) -> dict[str, object]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}
