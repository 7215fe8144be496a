"""Responses to clients: the objects of OpenAI's API, made from replies, and errors in the shape of that API."""

import json
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from loguru import logger

from openchatkit.errors import UserError
from openchatkit.inference import report
from openchatkit.inference.responder import Reply
from openchatkit.texts import reason_of

if TYPE_CHECKING:
    from starlette.responses import Response

# An interrupted reply has no reason here: it becomes an error.
_FINISH = {"end": "stop", "length": "length", "moderated": "content_filter"}


def json_response(body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> "Response":
    """Return an ASGI response of a JSON object that no cache keeps."""
    from starlette.responses import Response

    fields = {"Cache-Control": "no-store", **(headers or {})}
    return Response(json.dumps(body), status, fields, media_type="application/json")


# -- errors


class ApiError(Exception):
    """An error for a client: HTTP `status`, a `message` for people, the `param` at fault, a `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """The error as JSON."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> "Response":
        """The error as an ASGI response; it closes the connection, since the request's body may not have been read."""
        return json_response(self.body, status=self.status, headers={**self.headers, "Connection": "close"})


def internal_error(error: BaseException) -> ApiError:
    """Log where a defect of the kit is, in one line, and return an error that tells the client nothing about it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = (
        ""
        if trace is None or isinstance(error, UserError)
        else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
    )
    reason = reason_of(error)
    logger.error(f"error: a request failed: {type(error).__name__}: {reason}{place}")
    return ApiError(500, "internal error; see the server log", code="internal_error")


def shutting_down() -> ApiError:
    """Return the error for requests that are not answered because the server stops."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


# -- replies


def model_object(name: str, created: int) -> dict[str, object]:
    """Return a model as /v1/models lists it; `created` in seconds since 1970."""
    return {"id": name, "object": "model", "created": created, "owned_by": "openchatkit"}


class Completion:
    """A reply to a chat or to a plain prompt as OpenAI's objects, whole or in chunks."""

    def __init__(self, model: str, *, chat: bool, include_usage: bool = False) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._common: dict[str, object] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, reply: Reply) -> dict[str, object]:
        """Return the reply as one object."""
        content: dict[str, object] = {"text": reply.text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": reply.text, "refusal": None}}
        choice = _choice(content, _FINISH[reply.finish])
        return {**self._common, "choices": [choice], "usage": _usage(reply), **_sources(reply)}

    def first_chunks(self) -> list[dict[str, object]]:
        """Return the chunks before any text."""
        return [self._chunk({"role": "assistant", "content": ""})] if self._chat else []

    def chunk(self, text: str) -> dict[str, object]:
        """Return a chunk of text."""
        return self._chunk({"content": text} if self._chat else text)

    def last_chunks(self, reply: Reply) -> list[dict[str, object]]:
        """Return the chunks after all text."""
        last = self._chunk({} if self._chat else "", _FINISH[reply.finish])
        chunks = [{**last, **_sources(reply)}]
        if self._include_usage:
            chunks.append({**last, "choices": [], "usage": _usage(reply)})
        return chunks

    def _chunk(self, content: object, finish: str | None = None) -> dict[str, object]:
        choice = _choice({"delta" if self._chat else "text": content}, finish)
        chunk = {**self._common, "choices": [choice]}
        if self._chat:
            chunk["object"] = "chat.completion.chunk"
        if self._include_usage:
            chunk["usage"] = None
        return chunk


def _choice(content: dict[str, object], finish: str | None) -> dict[str, object]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def _usage(reply: Reply) -> dict[str, object]:
    """Return a reply's tokens; `dropped_pairs`, the kit's own, counts old questions that did not fit any more."""
    statistics = reply.statistics
    counts: dict[str, object] = {
        "prompt_tokens": statistics.prompt_tokens,
        "completion_tokens": statistics.new_tokens,
        "total_tokens": statistics.prompt_tokens + statistics.new_tokens,
        "prompt_tokens_details": {"cached_tokens": statistics.cached_tokens},
    }
    return {**counts, "dropped_pairs": reply.dropped} if reply.dropped else counts


def _sources(reply: Reply) -> dict[str, object]:
    """Return `sources`, the kit's own: where passages are from, if any were searched for, and a `note` if that failed.

    The reason of a failure may name folders of the server, so it is only in the log.
    """
    if reply.sources is None:
        return {}
    note = {"note": "passages are missing: the server's log says why"} if reply.note else {}
    return {"sources": report.sources(reply), **note}
