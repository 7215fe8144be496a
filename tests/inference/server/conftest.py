"""Servers on this machine, over small models, and clients to ask them with."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from served import Running
from transformers import AutoModelForCausalLM

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.inference.conversation.rendering import KitRendering
from openchatkit.inference.engine.engine import Engine
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.responder import Responder
from openchatkit.inference.server.app import ServerOptions, create_app
from openchatkit.inference.server.schema import ServedModel
from openchatkit.inference.server.worker import Worker
from openchatkit.libraries import uvicorn_http
from openchatkit.web import address_of, bind, settings

GREEDY = Sampling(max_tokens=30, sample=False)


Serve = Callable[..., "contextlib.AbstractContextManager[Running]"]


@pytest.fixture(scope="session")
def responder_of() -> Callable[[Path], Responder]:
    """A responder over the model in a folder."""

    def load(folder: Path) -> Responder:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        engine = Engine(model, eos_ids=[0], device=torch.device("cpu"))
        tokenizer = Tokenizer(folder)
        return Responder(engine, tokenizer, KitRendering(tokenizer))

    return load


@pytest.fixture(scope="session")
def serve(responder_of) -> Serve:
    """A context in which a model is served: serve(folder or responder, max_queue=, and ServerOptions by name)."""

    @contextlib.contextmanager
    def serving(
        model: Path | Responder,
        *,
        max_queue: int = 4,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = 100,
        patience: float = uvicorn_http.PATIENCE,
        **options: object,
    ) -> Iterator[Running]:
        responder = model if isinstance(model, Responder) else responder_of(model)
        listener = bind("127.0.0.1", 0)
        listener.listen()
        worker = Worker(max_waiting=max_queue, stopping=lambda: server.should_exit)
        served = ServerOptions(ServedModel("tiny", sampling, max_new_tokens), **options)
        server = uvicorn.Server(settings(create_app(responder, worker, served), patience=patience))
        answering = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        generating = threading.Thread(target=worker.run)
        address, port = address_of(listener), listener.getsockname()[1]
        answering.start()
        generating.start()
        try:
            yield Running(address, port, worker, responder, served.token)
        finally:
            server.should_exit = True
            answering.join(timeout=60)
            worker.stop()
            generating.join(timeout=60)
        assert not answering.is_alive()
        assert not generating.is_alive()

    return serving


@pytest.fixture(scope="session")
def trained(serve, trained_model) -> Iterator[Running]:
    """The server of the model that answers."""
    with serve(trained_model) as running:
        yield running


@pytest.fixture
def endless(serve, endless_model) -> Iterator[Running]:
    """A server of the model that never ends, with room for one more to wait."""
    with serve(endless_model, max_queue=1, max_new_tokens=1_000_000, heartbeat=0.05) as running:
        yield running
