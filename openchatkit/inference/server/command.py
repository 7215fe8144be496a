"""The command `inference/server.py`: its flags, and a server for the model that they name."""

import argparse
import logging
import os
import re
import signal
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from loguru import logger

from openchatkit import cli, web
from openchatkit.errors import UserError
from openchatkit.inference import flags
from openchatkit.inference.retrieval import flags as retrieval

if TYPE_CHECKING:
    import uvicorn

    from openchatkit.inference.responder import Responder
    from openchatkit.inference.retrieval.retriever import Retriever
    from openchatkit.inference.server.worker import Worker

TOKEN_VARIABLE = "OPENCHATKIT_TOKEN"
DEFAULT_MAX_NEW_TOKENS = 2048
_SHORTEST_TOKEN = 16
# A scheme, also that of a browser's extension, a host, and perhaps a port. "*" and "null" would let any page in.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#*@,]+")
_MAKE_TOKEN = "python -c 'import secrets; print(secrets.token_urlsafe())' makes one"


def parser() -> cli.Parser:
    """Return the parser of the flags of a model, of sampling and of a server."""
    given = cli.Parser(
        prog="inference/server.py",
        description="Serve a model by OpenAI's API (/v1/chat/completions, /v1/completions, /v1/models), and a page to "
        "chat in at /. Other machines need a token to use it.",
    )
    flags.add_model_flags(given)
    flags.add_sampling_flags(given, max_tokens=None)
    retrieval.add_flags(given)
    given.add_argument(
        "--host", default="127.0.0.1", help=f"the address to listen on; any other needs {TOKEN_VARIABLE}"
    )
    given.add_argument("--port", type=_port, default=8000, help="the port to listen on; 0 takes a free one")
    given.add_argument("--allow-host", nargs="+", default=[], metavar="NAME", help="names that clients call it by")
    origins = "origins of web pages that may use it besides its own, such as https://chat.example; none if not given"
    given.add_argument("--allow-origin", nargs="+", type=_origin, default=[], metavar="ORIGIN", help=origins)
    given.add_argument("--token-file", type=Path, help=f"a file with the token that {TOKEN_VARIABLE} gives otherwise")
    refused = f"refused: other users see command lines; set {TOKEN_VARIABLE}, or use --token-file"
    advice = (
        f"set {TOKEN_VARIABLE} in the environment or pass --token-file FILE, and take another token if it was typed "
        "here"
    )
    given.add_argument("--token", "--api-key", nargs="?", action=cli.RefuseSecret, const=advice, help=refused)
    given.add_argument("--max-queue", type=cli.natural, default=16, help="requests that may wait for their turn")
    often = "requests a minute from one address; 0 is no limit"
    given.add_argument("--max-rate", type=cli.natural, default=300, help=often)
    given.add_argument("--max-body", type=cli.positive_int, default=1 << 20, help="bytes that a request may have")
    longest = f"the longest reply, whatever a request asks for; {DEFAULT_MAX_NEW_TOKENS} tokens if not given"
    given.add_argument("--max-new-tokens", type=cli.positive_int, help=longest)
    slow = "seconds that a request may take, waiting included"
    given.add_argument("--timeout", type=cli.positive_float, default=600.0, help=slow)
    kept = "conversations whose keys and values are kept, so that only their next question has to be read"
    given.add_argument("--cached-conversations", type=cli.positive_int, default=4, help=kept)
    given.add_argument("--access-log", action="store_true", help="log a line for each request")
    return given


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Load the model, then answer requests until Ctrl-C or SIGTERM."""
    given = parser().parse_args(argv)
    web.check_installed("the server")
    token = read_token(given.token_file, given.host)
    listener = web.bind(given.host, given.port)  # fails now, not after the minutes of loading a model
    with listener:
        retriever = retrieval.retriever(given, logger.info)
        responder = flags.responder(given, logger.info, slots=given.cached_conversations)
        _serve(given, responder, retriever, listener, token)
    return 0


def read_token(file: Path | None, host: str) -> str | None:
    """Read the token that clients must send from a file or the environment; UserError where one is required."""
    place = f"the token in {file}" if file else f"the token in {TOKEN_VARIABLE}"
    try:
        token = file.read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN_VARIABLE, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not token and (file or not web.is_loopback(host)):
        what = (
            f"--token-file {file} is empty" if file else f"--host {host} lets other machines in, and there is no token"
        )
        raise UserError(f"{what}: set {TOKEN_VARIABLE} in the environment, or pass --token-file; {_MAKE_TOKEN}")
    if token and not re.fullmatch(rf"[!-~]{{{_SHORTEST_TOKEN},}}", token):
        expected = f"at least {_SHORTEST_TOKEN} printable ASCII characters without spaces"
        raise UserError(f"{place} cannot be used: expected {expected}; {_MAKE_TOKEN}")
    return token or None


def _serve(
    given: argparse.Namespace,
    responder: "Responder",
    retriever: "Retriever | None",
    listener: socket.socket,
    token: str | None,
) -> None:
    import uvicorn

    from openchatkit.inference.server.app import ServerOptions, create_app
    from openchatkit.inference.server.schema import ServedModel
    from openchatkit.inference.server.worker import Worker

    default, longest = reply_lengths(given)
    folder = Path(given.model).expanduser()
    name = folder.resolve().name if folder.is_dir() else given.model
    options = ServerOptions(
        ServedModel(name, replace(flags.sampling(given), max_tokens=default), longest, given.seed),
        host=given.host,
        names=given.allow_host,
        origins=given.allow_origin,
        token=token,
        max_rate=given.max_rate,
        max_body=given.max_body,
        timeout=given.timeout,
        retriever=retriever,
    )
    worker = Worker(max_waiting=given.max_queue, stopping=lambda: server.should_exit)
    app = create_app(responder, worker, options)
    server = uvicorn.Server(web.settings(app, connections=given.max_queue + 500, access_log=given.access_log))
    if given.access_log:
        _log_access()
    try:
        listener.listen()
    except OSError as error:
        raise UserError(
            f"--port {given.port} was taken by another server while the model was loaded: {error.strerror}"
        ) from error
    logger.info(_welcome(web.address_of(listener), name, token))
    _run(server, worker, listener)


def _run(server: "uvicorn.Server", worker: "Worker", listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C: HTTP in a thread of its own, replies in this one, which loaded the model."""
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        server.handle_exit(number, frame)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    with ThreadPoolExecutor(1, thread_name_prefix="http") as threads:
        answering = threads.submit(server.run, sockets=[listener])
        answering.add_done_callback(lambda _: worker.stop())
        worker.run()
        answering.result()
    if signal.SIGINT in received:
        raise KeyboardInterrupt


def reply_lengths(given: argparse.Namespace) -> tuple[int, int]:
    """Return the longest reply in tokens to requests without a limit of their own, and to all requests."""
    longest = given.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    return min(given.max_tokens or longest, longest), longest


def _welcome(address: str, name: str, token: str | None) -> str:
    key = f' -H "Authorization: Bearer ${TOKEN_VARIABLE}"' if token else ""
    message = '{"messages": [{"role": "user", "content": "Hello"}]}'
    return (
        f"{name} is at {address}/ - chat there, or try: curl {address}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d '{message}'"
    )


def _log_access() -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logger.info(record.getMessage())

    access = logging.getLogger("uvicorn.access")
    access.setLevel(logging.INFO)
    access.handlers = [Handler()]
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


def _origin(text: str) -> str:
    origin = text.lower().removesuffix("/")
    if not _ORIGIN.fullmatch(origin):
        raise argparse.ArgumentTypeError(f"expected an origin such as https://chat.example, got {text!r}")
    for scheme, port in (("http", ":80"), ("https", ":443")):
        origin = origin.removesuffix(port) if origin.startswith(f"{scheme}://") else origin
    return origin


def _port(text: str) -> int:
    port = cli.natural(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return port
