"""The paths of the server and what each does."""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from loguru import logger

from openchatkit.inference.conversation import context
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.responder import Emit, Reply, Responder
from openchatkit.inference.retrieval.retriever import Found, Retriever
from openchatkit.inference.server import answers, delivery, schema
from openchatkit.inference.server.errors import ApiError, defect
from openchatkit.inference.server.fields import parse
from openchatkit.inference.server.guard import Guard, send_error, send_json
from openchatkit.inference.server.rate import Rate
from openchatkit.inference.server.worker import Job, Worker

BODY_SECONDS = 30.0
# A body too large is read on, and forgotten, up to so many times the limit: who is still sending would not hear why.
PATIENCE = 8

# Names the fields of a request that were passed over.
IGNORED = "X-Ignored-Fields"

# An ASGI application, or a response, which is one too.
Asgi = Callable[[dict[str, Any], Any, Any], Any]


@dataclass(frozen=True)
class Options:
    """What is served, from which index passages come, and limits.

    `max_rate` requests a minute from one address (0: any number), `max_body` bytes of a request, `timeout` seconds of
    one, `heartbeat` seconds between signs of life while a client waits.
    """

    served: schema.Served
    host: str = "127.0.0.1"
    names: Collection[str] = ()
    origins: Collection[str] = ()
    token: str | None = None
    max_rate: int = 0
    max_body: int = 1 << 20
    timeout: float = 600.0
    heartbeat: float = delivery.HEARTBEAT_SECONDS
    retriever: Retriever | None = None


def create_app(responder: Responder, worker: Worker, options: Options) -> Asgi:
    """The ASGI application; `worker` must be running when requests come."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    api = Api(responder, worker, options)
    routes = [
        Route("/", _page()),
        Route("/health", api.health),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
    ]
    handlers = {
        ApiError: _answer_error,
        HTTPException: _answer_no_route,
        ClientDisconnect: _answer_nobody,
        Exception: _answer_defect,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    rate = Rate(options.max_rate) if options.max_rate else None
    return Guard(app, host=options.host, names=options.names, origins=options.origins, token=options.token, rate=rate)


class Api:
    """The handlers of the paths under /v1; each takes starlette's request and returns a response."""

    def __init__(self, responder: Responder, worker: Worker, options: Options) -> None:
        self._responder = responder
        self._worker = worker
        self._options = options
        self._served = replace(options.served, retrieval=options.retriever is not None)
        self._created = int(time.time())

    async def health(self, request: Any) -> Asgi:
        """Whether requests are answered, for whoever watches over the server."""
        return _json({"status": "ok"})

    async def models(self, request: Any) -> Asgi:
        """The one model, as a list."""
        return _json({"object": "list", "data": [answers.model(self._served.model, self._created)]})

    async def model(self, request: Any) -> Asgi:
        """The one model, if it is named."""
        if request.path_params["name"] != self._served.model:
            raise schema.no_model(request.path_params["name"], self._served)
        return _json(answers.model(self._served.model, self._created))

    async def chat(self, request: Any) -> Asgi:
        """A conversation's next reply."""
        ask = schema.chat(parse(await _body(request, self._options.max_body)), self._served)
        return self._start(ask, chat=True)

    async def completions(self, request: Any) -> Asgi:
        """A prompt's continuation, as it stands."""
        ask = schema.completion(parse(await _body(request, self._options.max_body)), self._served)
        return self._start(ask, chat=False)

    def _start(self, ask: schema.Ask, *, chat: bool) -> Asgi:
        retriever = self._options.retriever if ask.retrieval else None
        job = Job(lambda emit, cancelled: generate(self._responder, ask, emit, cancelled, retriever))
        answer = answers.Answer(self._served.model, chat=chat, include_usage=ask.include_usage)
        self._worker.submit(job)
        return delivery.Delivery(
            job,
            self._worker,
            answer,
            stream=ask.stream,
            timeout=self._options.timeout,
            heartbeat=self._options.heartbeat,
            headers={IGNORED: ", ".join(ask.ignored)} if ask.ignored else {},
        )


def generate(
    responder: Responder,
    ask: schema.Ask,
    emit: Emit,
    cancelled: Callable[[], bool],
    retriever: Retriever | None = None,
) -> Reply:
    """Make the reply to a request, with passages from the `retriever` if there is one.

    ApiError 400 when it is too long for the model; raises as the responder does.
    """
    generator = torch.Generator()
    if ask.seed is None:
        generator.seed()
    else:
        generator.manual_seed(ask.seed)
    how = {"generator": generator, "stop": ask.stop, "emit": emit, "cancelled": cancelled}
    try:
        if not isinstance(ask.subject, Conversation):
            return responder.complete(ask.subject, ask.sampling, **how)
        found = retriever.add(ask.subject, responder, ask.sampling) if retriever else Found(ask.subject)
        if found.note:
            logger.warning(found.note)
        return found.told(responder.answer(found.conversation, ask.sampling, **how))
    except context.TooLong as error:
        raise _too_long(responder, ask) from error


def _too_long(responder: Responder, ask: schema.Ask) -> ApiError:
    chat = isinstance(ask.subject, Conversation)
    what = "the last question, with the system text," if chat else "prompt"
    message = (
        f"{what} leaves no room for a reply in the {responder.engine.context_length} tokens that the model reads at "
        "once"
    )
    return ApiError(400, message, param="messages" if chat else "prompt", code="context_length_exceeded")


async def _body(request: Any, limit: int) -> bytes:
    """The bytes of a request that says it is JSON, counted as they come: 413 beyond `limit`, 408 if they do not."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"the Content-Type is {kind[:60]!r}: expected application/json", code="not_json")

    async def read() -> bytes:
        data, size = bytearray(), 0
        async for piece in request.stream():
            size += len(piece)
            if size <= limit:
                data += piece
            elif size > PATIENCE * limit:
                break
        if size > limit:
            raise ApiError(413, f"the body is too large: expected at most {limit} bytes", code="body_too_large")
        return bytes(data)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise ApiError(408, "the body did not come", code="timeout") from error


def _page() -> Callable[[Any], Any]:
    """The handler of the chat page, which may run its own script and style, and talk to this server, and no more."""
    page = resources.files(__package__).joinpath("page.html").read_bytes()
    script, style = (_digest(page, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}

    async def handler(request: Any) -> Asgi:
        from starlette.responses import Response

        return Response(page, media_type="text/html", headers=headers)

    return handler


def _digest(page: bytes, tag: bytes) -> str:
    content = re.search(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)[1]
    return "sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode()


def _json(body: object) -> Asgi:
    async def response(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send_json(body, send)

    return response


def _error(error: ApiError) -> Asgi:
    async def response(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send_error(error, send)

    return response


async def _answer_error(request: Any, error: ApiError) -> Asgi:
    return _error(error)


async def _answer_no_route(request: Any, error: Any) -> Asgi:
    message = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    return _error(ApiError(error.status_code, message.get(error.status_code, error.detail), headers=error.headers))


async def _answer_nobody(request: Any, error: Exception) -> Asgi:
    return _error(ApiError(400, "the client hung up before its request was whole"))


async def _answer_defect(request: Any, error: Exception) -> Asgi:
    return _error(defect(error))
