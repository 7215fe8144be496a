"""The server's paths and their handlers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING

import torch
from loguru import logger

from openchatkit import web
from openchatkit.inference.conversation import context
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.responder import Emit, Reply, Responder
from openchatkit.inference.retrieval.retriever import Retriever
from openchatkit.inference.server import delivery, schema
from openchatkit.inference.server.fields import parse_json
from openchatkit.inference.server.guard import Guard, RateLimiter
from openchatkit.inference.server.responses import ApiError, Completion, internal_error, json_response, model_object
from openchatkit.inference.server.worker import ReplyJob, Worker

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

_BODY_SECONDS = 30.0
# A body that is too large is read and discarded up to this many times the limit, so that its sender gets the answer.
PATIENCE = 8

# The header of an answer that names the ignored fields of its request.
IGNORED = "X-Ignored-Fields"


@dataclass(frozen=True)
class ServerOptions:
    """The model served, the index to search, and limits.

    `max_rate` requests a minute from one address (0: any number), `max_body` bytes of a request, `timeout` seconds for
    one, `heartbeat` seconds between signs of life while a client waits, `pace` seconds between pieces of a stream.
    """

    served: schema.ServedModel
    host: str = "127.0.0.1"
    names: Collection[str] = ()
    origins: Collection[str] = ()
    token: str | None = None
    max_rate: int = 0
    max_body: int = 1 << 20
    timeout: float = 600.0
    heartbeat: float = delivery.HEARTBEAT_SECONDS
    pace: float = delivery.PACE_SECONDS
    retriever: Retriever | None = None


def create_app(responder: Responder, worker: Worker, options: ServerOptions) -> "ASGIApp":
    """Return the ASGI application; `worker` must be running when requests come."""
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
    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        ApiError: _answer_api_error,
        HTTPException: _answer_no_route,
        ClientDisconnect: _answer_disconnect,
        Exception: _answer_internal_error,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    rate = RateLimiter(options.max_rate) if options.max_rate else None
    return Guard(app, host=options.host, names=options.names, origins=options.origins, token=options.token, rate=rate)


class Api:
    """The handlers of the paths; each takes starlette's request and returns an ASGI response."""

    def __init__(self, responder: Responder, worker: Worker, options: ServerOptions) -> None:
        self._responder = responder
        self._worker = worker
        self._options = options
        self._served = replace(options.served, retrieval=options.retriever is not None)
        self._created = int(time.time())

    async def health(self, request: "Request") -> "Response":
        """Answer a monitor: the server takes requests."""
        return json_response({"status": "ok"})

    async def models(self, request: "Request") -> "Response":
        """List the one model."""
        return json_response({"object": "list", "data": [model_object(self._served.model, self._created)]})

    async def model(self, request: "Request") -> "Response":
        """Describe the model of this name; ApiError 404 for any but the one served."""
        if request.path_params["name"] != self._served.model:
            raise schema.no_model(request.path_params["name"], self._served)
        return json_response(model_object(self._served.model, self._created))

    async def chat(self, request: "Request") -> delivery.Delivery:
        """Answer a conversation."""
        body = parse_json(await _read_body(request, self._options.max_body))
        return self._start(schema.parse_chat(body, self._served), chat=True)

    async def completions(self, request: "Request") -> delivery.Delivery:
        """Continue a prompt as it stands."""
        body = parse_json(await _read_body(request, self._options.max_body))
        return self._start(schema.parse_completion(body, self._served), chat=False)

    def _start(self, request: schema.CompletionRequest, *, chat: bool) -> delivery.Delivery:
        retriever = self._options.retriever if request.retrieval else None
        job = ReplyJob(lambda emit, cancelled: generate(self._responder, request, emit, cancelled, retriever))
        self._worker.submit(job)
        return delivery.Delivery(
            job,
            self._worker,
            Completion(self._served.model, chat=chat, include_usage=request.include_usage),
            stream=request.stream,
            timeout=self._options.timeout,
            heartbeat=self._options.heartbeat,
            pace=self._options.pace,
            headers={IGNORED: ", ".join(request.ignored)} if request.ignored else {},
        )


def generate(
    responder: Responder,
    request: schema.CompletionRequest,
    emit: Emit,
    cancelled: Callable[[], bool],
    retriever: Retriever | None = None,
) -> Reply:
    """Make the reply to a request, with passages from the `retriever` if there is one.

    ApiError 400 when the request is too long for the model; raises as the responder does.
    """
    generator = torch.Generator()
    if request.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.seed)
    try:
        return responder.answer(
            request.subject,
            request.sampling,
            retriever=retriever,
            generator=generator,
            stop=request.stop,
            emit=emit,
            cancelled=cancelled,
            warn=logger.warning,
        )
    except context.TooLong as error:
        raise _too_long(responder, request) from error


def _too_long(responder: Responder, request: schema.CompletionRequest) -> ApiError:
    chat = isinstance(request.subject, Conversation)
    what = "the last question, with the system text," if chat else "prompt"
    message = (
        f"{what} leaves no room for a reply in the {responder.engine.context_length} tokens that the model reads at "
        "once"
    )
    return ApiError(400, message, param="messages" if chat else "prompt", code="context_length_exceeded")


async def _read_body(request: "Request", limit: int) -> bytes:
    """Read the body of a JSON request. ApiError 415 for another type, 413 beyond `limit` bytes, 408 if it is slow."""
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
        return await asyncio.wait_for(read(), _BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise ApiError(408, "the body did not arrive in time", code="timeout") from error


def _page() -> "Callable[[Request], Awaitable[Response]]":
    """Return the handler of the chat page, whose policy allows its own script and style, and this server, alone."""
    page = resources.files(__package__).joinpath("page.html").read_bytes()
    headers = web.page_headers(page)

    async def handler(request: "Request") -> "Response":
        from starlette.responses import Response

        return Response(page, media_type="text/html", headers=headers)

    return handler


async def _answer_api_error(request: "Request", error: Exception) -> "Response":
    assert isinstance(error, ApiError), error
    return error.response()


async def _answer_no_route(request: "Request", error: Exception) -> "Response":
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException), error
    message = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for {request.url.path}"}
    text = message.get(error.status_code, error.detail)
    return ApiError(error.status_code, text, headers=error.headers).response()


async def _answer_disconnect(request: "Request", error: Exception) -> "Response":
    return ApiError(400, "the client disconnected before its request was complete").response()


async def _answer_internal_error(request: "Request", error: Exception) -> "Response":
    return internal_error(error).response()
