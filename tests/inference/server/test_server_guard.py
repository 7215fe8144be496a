"""Who may ask and how much: Host, Origin, token, bodies, the queue, time, hang-ups, and failures inside."""

import asyncio
import contextlib
import functools
import itertools
import json
import re
import socket
import struct

import openai
import pytest
from served import CHAT, HELLO, Running, parsed, post, wait_until

from openchatkit.errors import UserError
from openchatkit.inference.conversation.rendering import KitRendering
from openchatkit.inference.engine.engine import OutOfMemory
from openchatkit.inference.responder import Responder
from openchatkit.inference.server.guard import MOST_ADDRESSES, Guard, RateLimiter
from openchatkit.inference.server.responses import json_response
from openchatkit.inference.server.worker import Worker
from openchatkit.libraries import uvicorn_http
from openchatkit.web import settings

TOKEN = "a-token-of-the-tests"
ENDLESS = {"messages": HELLO, "max_tokens": 1_000_000}


@pytest.fixture(scope="session")
def guarded(serve, trained_model):
    """A server with a token, on an address of which it knows one more name."""
    with serve(trained_model, token=TOKEN, names=["Chat.Example"]) as running:
        yield running


def get(running: Running, path: str, **headers: str) -> bytes:
    """The whole answer to a GET."""
    fields = {"Host": "localhost", "Connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return running.send(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode())


def read_until(client: socket.socket, wanted: bytes) -> bytes:
    """What comes on a connection up to and with some bytes; the test's own time limit is the only one."""
    data = b""
    while wanted not in data:
        piece = client.recv(1 << 16)
        assert piece, f"{wanted!r} did not come, only {data!r}"
        data += piece
    return data


# -- Host, Origin, token


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "10.0.0.1"]
)
def test_a_host_that_is_not_ours_is_refused(trained, host):
    for answer in (get(trained, "/", Host=host), trained.send(post(CHAT, {"messages": HELLO}, Host=host))):
        status, body = parsed(answer)
        assert (status, body["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:81", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_the_names_of_this_machine_are_ours(trained, host):
    assert parsed(get(trained, "/health", Host=host)) == (200, {"status": "ok"})


def test_a_name_that_is_allowed_is_ours(guarded):
    assert parsed(get(guarded, "/health", Host="chat.example:443"))[0] == 200


def test_a_server_on_all_addresses_goes_by_any_address_but_not_by_any_name(serve, trained):
    with serve(trained.responder, host="0.0.0.0") as running:
        assert parsed(get(running, "/health", Host="192.0.2.7:8000"))[0] == 200
        assert parsed(get(running, "/health", Host="evil.example"))[0] == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://localhost", ""])
def test_a_page_of_another_origin_may_not_ask(trained, origin):
    status, body = trained.ask(CHAT, {"messages": HELLO}, Origin=origin)
    assert (status, body["error"]["code"]) == (403, "wrong_origin")


def test_a_page_of_an_allowed_origin_may_ask_and_read_and_no_other(serve, trained):
    page = "https://chat.example"
    with serve(trained.responder, origins=[page], token=TOKEN) as running:
        before = {"Origin": page, "Access-Control-Request-Method": "POST"}
        before |= {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
        fields = {"Host": "localhost", "Connection": "close", **before}
        request = f"OPTIONS {CHAT} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        answer = running.send(f"{request}\r\n".encode()).lower()
        assert answer.startswith(b"http/1.1 204")
        assert f"access-control-allow-origin: {page}\r\n".encode() in answer
        assert b"access-control-allow-headers: authorization,content-type,x-stainless-os\r\n" in answer
        assert b"access-control-allow-methods: get, post\r\n" in answer
        body = {"messages": HELLO, "user": "x"}
        answer = running.send(post(CHAT, body, Origin=page, Authorization=f"Bearer {TOKEN}")).lower()
        assert answer.startswith(b"http/1.1 200")
        assert f"access-control-allow-origin: {page}\r\n".encode() in answer
        assert b"access-control-expose-headers: retry-after, x-ignored-fields\r\n" in answer
        # An error is there to be read, too.
        answer = running.send(post(CHAT, body, Origin=page)).lower()
        assert answer.startswith(b"http/1.1 401")
        assert f"access-control-allow-origin: {page}\r\n".encode() in answer
        other = running.send(f"{request}\r\n".replace("chat.example", "evil.example").encode()).lower()
        assert other.startswith(b"http/1.1 403")
        assert b"access-control-" not in other
        assert b"access-control-" not in get(running, "/v1/models", Origin="https://evil.example").lower()
        assert running.ask(CHAT, body, Origin="https://evil.example")[0] == 403


def test_our_own_page_may_ask_and_nobody_is_told_of_other_origins(trained):
    origin = f"http://localhost:{trained.port}"
    answer = trained.send(post(CHAT, {"messages": HELLO}, Host=origin[7:], Origin=origin))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"access-control" not in answer.lower()


@pytest.mark.parametrize("key", ["another-token-of-tests", TOKEN + "x", TOKEN[:-1], "\u20ac"])
def test_a_wrong_token_is_refused(guarded, key):
    status, body = guarded.ask(CHAT, {"messages": HELLO}, Authorization=f"Bearer {key}")
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")


def test_without_the_token_only_the_page_and_health_are_there(guarded):
    for path in ("/v1/models", "/v1/models/tiny", "/v1/nothing"):
        answer = get(guarded, path)
        assert parsed(answer)[0] == 401
        assert b"www-authenticate: Bearer" in answer
    assert parsed(get(guarded, "/v1/models", Authorization=f"Basic {TOKEN}"))[0] == 401
    assert parsed(get(guarded, "/health"))[0] == 200
    assert get(guarded, "/").startswith(b"HTTP/1.1 200")
    with pytest.raises(openai.AuthenticationError):
        guarded.client("another-token-of-tests").models.list()


def test_with_the_token_everything_is(guarded):
    reply = guarded.client().chat.completions.create(model="tiny", messages=HELLO)
    assert reply.choices[0].message.content == "first"


# -- rate


def test_an_address_that_asks_too_often_must_wait_and_others_need_not():
    now = [0.0]
    rate = RateLimiter(120, clock=lambda: now[0])
    assert [rate.take("a") for _ in range(121)] == [0] * 120 + [0.5]
    assert rate.take("b") == 0
    now[0] = 0.4
    assert rate.take("a") == pytest.approx(0.1)
    now[0] = 1.0
    assert [rate.take("a") for _ in range(3)] == [0, 0, pytest.approx(0.5)]
    now[0] = 1e6
    assert [rate.take("a") for _ in range(121)].count(0) == 120


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:0:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_a_network_of_ipv6_is_one_address(one, other, same):
    statuses = []

    async def application(scope, receive, send):
        await json_response({})(scope, receive, send)

    async def send(message):
        statuses.append(message.get("status"))

    guard = Guard(application, host="::", rate=RateLimiter(1, clock=lambda: 0.0))
    for address in (one, other):
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "client": (address, 1)}
        asyncio.run(guard({**scope, "headers": [(b"host", b"localhost")]}, None, send))
    assert [status for status in statuses if status] == [200, 429 if same else 200]


def test_addresses_are_not_kept_without_limit():
    rate = RateLimiter(1, clock=lambda: 0.0)
    for number in range(MOST_ADDRESSES + 1):
        assert rate.take(str(number)) == 0
    assert rate.take(str(MOST_ADDRESSES)) == 60
    assert rate.take("0") == 0


def test_too_many_requests_in_a_minute_are_refused_before_the_token_is_looked_at(serve, trained):
    with serve(trained.responder, max_rate=2, token=TOKEN) as running:
        assert [parsed(get(running, "/v1/models"))[0] for _ in range(2)] == [401, 401]
        answer = get(running, "/v1/models", Authorization=f"Bearer {TOKEN}")
        assert parsed(answer)[1]["error"]["code"] == "rate_limit_exceeded"
        assert re.search(rb"retry-after: [1-9]", answer)
        assert parsed(get(running, "/health"))[0] == 200


# -- paths and bodies


@pytest.mark.parametrize(("path", "status"), [("/nothing", 404), ("/v1/chat/completions", 405), ("/v1/models/", 404)])
def test_what_is_not_there_is_an_error_of_the_same_shape(trained, path, status):
    found, body = parsed(get(trained, path))
    assert found == status
    assert body["error"]["type"] == "invalid_request_error"


def test_a_body_must_say_that_it_is_json(trained):
    # A form of a page elsewhere can be sent without asking first, but not as JSON.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, body = trained.ask(CHAT, {"messages": HELLO}, Content_Type=kind)
        assert (status, body["error"]["code"]) == (415, "not_json")
    assert trained.ask(CHAT, {"messages": HELLO}, Content_Type="application/JSON; charset=utf-8")[0] == 200


def test_a_body_too_large_is_refused_however_it_comes(serve, trained):
    with serve(trained.responder, max_body=1000) as running:
        fitting = json.dumps({"messages": HELLO}).encode().ljust(1000)
        assert running.ask(CHAT, fitting)[0] == 200
        for size in (1001, 5000):
            status, body = running.ask(CHAT, fitting.ljust(size))
            assert (status, body["error"]["code"]) == (413, "body_too_large")
            assert body["error"]["message"] == "the body is too large: expected at most 1000 bytes"
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [fitting[:500]] * 3) + b"0\r\n\r\n"
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
        )
        assert parsed(running.send(f"{head}\r\n\r\n".encode() + chunks))[0] == 413
        whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(fitting), fitting)
        assert parsed(running.send(f"{head}\r\nConnection: close\r\n\r\n".encode() + whole))[0] == 200


def test_a_body_that_never_ends_is_not_read_for_ever(serve, trained):
    with serve(trained.responder, max_body=1000) as running:
        request = post(CHAT, b"x", Content_Length="100000000")
        with running.connect(request + b"y" * 100_000) as connection:
            assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 413")


def test_a_client_that_hangs_up_within_its_body_is_no_defect(trained, capsys):
    with trained.connect(post(CHAT, b"{", Content_Length="100")):
        pass
    assert trained.ask(CHAT, {"messages": HELLO})[0] == 200
    assert capsys.readouterr().err == ""


# -- connections


@pytest.fixture
def hasty(serve):
    """A server that waits only a moment for a silent client."""
    return functools.partial(serve, patience=0.05)


@pytest.mark.parametrize("head", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"])
def test_a_connection_on_which_no_request_comes_is_cut(hasty, trained, head):
    with hasty(trained.responder) as running:
        assert running.send(head).count(b"HTTP/1.1 200") == head.count(b"\r\n\r\n")


def test_a_body_that_drips_behind_its_answer_is_cut_off(hasty, trained):
    head = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n"
    with hasty(trained.responder) as running, running.connect(head) as dripping, pytest.raises(ConnectionError):
        all(dripping.send(b"x") for _ in itertools.count())


def test_a_connection_stays_open_between_two_requests(hasty, trained):
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with hasty(trained.responder) as running, running.connect(health + b"\r\n") as connection:
        for _ in range(2):
            assert read_until(connection, b'{"status": "ok"}').startswith(b"HTTP/1.1 200")
            connection.settimeout(0.5)  # much longer than its patience
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(60)
            connection.sendall(health + b"\r\n")
        read_until(connection, b'{"status": "ok"}')
        # A request that is begun must come, as the first must.
        connection.sendall(health)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert settings(None).timeout_keep_alive == uvicorn_http.KEEP_ALIVE > 60


def test_a_reply_may_take_longer_than_a_head(hasty, endless_model):
    endless = hasty(endless_model, heartbeat=0.05, max_new_tokens=1_000_000)
    with endless as running, running.connect(post(CHAT, {**ENDLESS, "stream": True})) as first:
        read_until(first, b" la")
        with running.connect(post(CHAT, {"messages": HELLO, "max_tokens": 1, "stream": True})) as second:
            for _ in range(8):
                read_until(second, b": waiting\n\n")
            first.close()
            read_until(second, b"data: [DONE]")


# -- the queue and time


def test_a_full_queue_says_when_to_come_again(endless):
    stream = post(CHAT, {**ENDLESS, "stream": True})
    with endless.connect(stream) as first, endless.connect(stream) as second:
        read_until(first, b" la")
        # The second waits, and is told so.
        assert b" la" not in read_until(second, b": waiting\n\n")
        answer = endless.send(post(CHAT, ENDLESS))
        assert parsed(answer)[0] == 429
        assert b"retry-after: 5" in answer
        with pytest.raises(openai.RateLimitError):
            endless.client().chat.completions.create(model="tiny", messages=HELLO)
        # When the first hangs up, it is the second's turn.
        first.close()
        read_until(second, b" la")


def test_who_hangs_up_while_waiting_leaves_the_queue(endless):
    with endless.connect(post(CHAT, {**ENDLESS, "stream": True})) as first:
        read_until(first, b" la")
        with endless.connect(post(CHAT, ENDLESS)):
            wait_until(lambda: endless.worker.waiting == 1)
        wait_until(lambda: endless.worker.waiting == 0)
        read_until(first, b" la")


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_ends_the_reply(endless, stream):
    client = endless.connect(post(CHAT, {**ENDLESS, "stream": stream}))
    wait_until(lambda: endless.worker.busy)
    # Rudely: what is on its way is lost, and the server is told by a reset.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    wait_until(lambda: not endless.worker.busy)
    assert endless.ask(CHAT, {"messages": HELLO, "max_tokens": 3})[0] == 200


def test_the_clients_close_ends_a_stream(endless):
    stream = endless.client().chat.completions.create(model="tiny", messages=HELLO, stream=True, max_tokens=1_000_000)
    assert "la" in "".join(next(stream).choices[0].delta.content for _ in range(20))
    stream.close()
    wait_until(lambda: not endless.worker.busy)


def test_a_reply_that_takes_too_long_is_given_up(serve, endless_model):
    with serve(endless_model, max_new_tokens=1_000_000, timeout=0.3) as running:
        status, body = running.ask(CHAT, ENDLESS)
        assert (status, body["error"]["code"]) == (504, "timeout")
        stream = running.client().chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=1_000_000, stream=True
        )
        with pytest.raises(openai.APIError, match="the reply took too long"):
            list(stream)
        wait_until(lambda: not running.worker.busy)
        assert running.ask(CHAT, {"messages": HELLO, "max_tokens": 1})[0] == 200


def test_a_reader_that_stops_reading_stops_nobody_else(endless):
    with endless.connect(post(CHAT, {"messages": HELLO, "max_tokens": 3000, "stream": True})) as idle:
        wait_until(lambda: endless.worker.busy)
        status, _ = endless.ask(CHAT, {"messages": HELLO, "max_tokens": 1})
        assert status == 200
        events = re.findall(rb'"content": "([^"]*)"', read_until(idle, b"data: [DONE]"))
        assert b"".join(events).count(b"la") > 500


def test_a_stop_of_the_server_ends_what_runs_and_what_waits(serve, endless_model):
    with serve(endless_model, max_new_tokens=1_000_000) as running:
        first = running.connect(post(CHAT, {**ENDLESS, "stream": True}))
        read_until(first, b" la")
        second = running.connect(post(CHAT, ENDLESS))
        wait_until(lambda: running.worker.waiting == 1)
    with first, second:
        assert b"the server is shutting down" in b"".join(iter(lambda: first.recv(1 << 16), b""))
        assert parsed(b"".join(iter(lambda: second.recv(1 << 16), b"")))[0] == 503


# -- failures inside


@pytest.fixture
def failing(serve, trained_model, responder_of):
    """A server whose engine raises what a list holds, one for each reply, until it is empty."""
    responder = responder_of(trained_model)
    errors: list[Exception] = []
    generate = responder.engine.generate

    def generate_or_fail(*arguments, **options):
        if errors:
            raise errors.pop()
        return generate(*arguments, **options)

    responder.engine.generate = generate_or_fail
    with serve(responder) as running:
        yield running, errors


@pytest.mark.parametrize("stream", [True, False])
def test_out_of_memory_is_an_answer_and_the_server_lives(failing, stream):
    running, errors = failing
    for error in (OutOfMemory("of the shell"), RuntimeError("CUDA out of memory."), MemoryError()):
        errors.append(error)
        status, body = running.ask(CHAT, {"messages": HELLO, "stream": stream})
        assert (status, body["error"]["code"], body["error"]["type"]) == (503, "out_of_memory", "server_error")
        assert body["error"]["message"] == "out of memory: send a shorter conversation or ask for fewer max_tokens"
    assert running.ask(CHAT, {"messages": HELLO})[0] == 200


def test_a_defect_tells_the_client_nothing_of_the_inside_and_the_log_where_it_is(failing, capsys):
    running, errors = failing
    errors.append(KeyError("a secret of the inside"))
    status, body = running.ask(CHAT, {"messages": HELLO})
    assert status == 500
    assert body["error"]["message"] == "internal error; see the server log"
    logged = capsys.readouterr().err
    assert "KeyError: 'a secret of the inside'" in logged
    assert "test_server_guard.py:" in logged
    assert "Traceback" not in logged
    assert running.ask(CHAT, {"messages": HELLO})[0] == 200


def test_a_template_that_fails_is_not_mistaken_for_a_text_too_long(serve, trained):
    class Failing(KitRendering):
        def tokens(self, conversation):
            raise UserError("this cannot be written")

    failing = Responder(trained.responder.engine, trained.responder.tokenizer, Failing(trained.responder.tokenizer))
    with serve(failing) as running:
        status, body = running.ask(CHAT, {"messages": HELLO})
    assert (status, body["error"]["code"]) == (500, "internal_error")


def test_a_worker_that_ends_refuses_more_work(trained):
    worker = Worker(max_waiting=1)
    worker.stop()
    worker.run()
    with pytest.raises(Exception, match="the server is shutting down"):
        worker.submit(None)
