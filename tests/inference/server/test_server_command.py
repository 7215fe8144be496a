"""The command itself: its flags, the lines that it ends with, and its start and stop as a process."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import openai
import pytest
from served import HELLO

from openchatkit.errors import UserError
from openchatkit.inference.server import command
from openchatkit.paths import ROOT

SERVER = ROOT / "inference" / "server.py"
TOKEN = "a-token-of-the-tests"


@contextlib.contextmanager
def started(python, model, *flags: str, **environment: str):
    """The command as a process, once it listens: (process, address, the lines that it began with)."""
    process = subprocess.Popen(
        [python, SERVER, "--model", str(model), "--port", "0", *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        text=True,
    )
    lines = []
    try:
        while not (address := re.search(r" is at (http://\S+:\d+)/ ", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], f"it ended: {lines}"
        yield process, address[1], lines
    finally:
        process.kill()
        process.communicate()


def client_of(address: str, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=token, max_retries=0, timeout=60)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_streams_and_then_the_server(quick_python, endless_model, sent, status):
    with started(quick_python, endless_model, "--no-sample", "--max-new-tokens", "1000000") as (
        process,
        address,
        lines,
    ):
        assert len(lines) == 2  # what is loaded, and where it is
        (model,) = client_of(address).models.list()
        assert model.id == endless_model.name
        stream = client_of(address).chat.completions.create(
            model=model.id, messages=HELLO, stream=True, max_tokens=1_000_000
        )
        assert "la" in "".join(next(stream).choices[0].delta.content for _ in range(20))
        process.send_signal(sent)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        out, err = process.communicate(timeout=60)
    assert (out, err) == ("", "interrupted\n" if status else "")
    assert process.returncode == status


def test_the_line_at_the_start_says_how_to_ask(trained_model, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    flags = ["--token-file", str(file), "--access-log", "--no-sample", "--max-tokens", "20", "--seed", "1"]
    with started(sys.executable, trained_model, *flags) as (process, address, lines):
        shown = lines[-1].split("try: ")[1]
        done = subprocess.run(
            ["bash", "-c", shown.replace("curl", "curl -s").replace("Hello", "hello")],
            capture_output=True,
            env={**os.environ, command.TOKEN_VARIABLE: TOKEN},
            check=True,
        )
        assert b'"content": "first"' in done.stdout
        assert re.search(r'127.0.0.1:\d+ - "POST /v1/chat/completions HTTP/1.1" 200', process.stderr.readline())
        with pytest.raises(openai.AuthenticationError):
            client_of(address).models.list()
        assert urllib.request.urlopen(address).status == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert TOKEN not in err
        assert TOKEN not in "".join(lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "65536"], "argument --port: expected a port from 0 to 65535, got '65536'"),
        (["--timeout", "0"], "argument --timeout: expected a number above 0, got '0'"),
        (["--max-queue", "-1"], "argument --max-queue: expected a whole number of at least 0, got '-1'"),
        (["--cached-conversations", "0"], "argument --cached-conversations: expected a whole number of at least 1"),
        (["--allow-origin", "*"], "argument --allow-origin: expected an origin such as https://chat.example, got '*'"),
        (["--allow-origin", "null"], "argument --allow-origin: expected an origin such as https://chat.example"),
        (["--allow-origin", "https://a.example/b"], "argument --allow-origin: expected an origin such as"),
        (["--token", "canary"], "--token/--api-key is not taken, since other users see command lines: set OPENCHATKIT"),
        (["--api-key=canary"], "--token/--api-key is not taken, since other users see command lines"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in, and there is no token: set OPENCHATKIT_TOKEN"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 lets other machines in, and there is no token"),
        (["--token-file", "/nowhere/token"], "--token-file /nowhere/token cannot be read: No such file or directory"),
        (["--token-file", "/dev/null"], "--token-file /dev/null is empty: set OPENCHATKIT_TOKEN in the environment"),
        (
            ["--host", "127.0.0.1", "--port", "{taken}"],
            "--host 127.0.0.1 --port {taken} cannot be listened on: Address",
        ),
    ],
)
def test_a_flag_that_cannot_be_is_one_line_before_any_model_is_loaded(monkeypatch, capsys, flags, message):
    monkeypatch.delenv(command.TOKEN_VARIABLE, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            command.main(["--model", "/nowhere", *(flag.replace("{taken}", taken) for flag in flags)])
    out, err = capsys.readouterr()
    assert err.startswith("error: " + message.replace("{taken}", taken))
    assert err.count("\n") == 1
    assert "canary" not in err
    assert (out, ended.value.code) == ("", 2)


@pytest.mark.parametrize("token", ["short", "fifteen-letters", "with a space in it", "w\u00ef\u00efth-no-ascii-only"])
def test_a_token_that_is_no_token_is_refused_without_showing_it(monkeypatch, token):
    monkeypatch.setenv(command.TOKEN_VARIABLE, token)
    with pytest.raises(
        UserError, match="the token in OPENCHATKIT_TOKEN cannot be used: expected at least 16 "
    ) as caught:
        command.read_token(None, "127.0.0.1")
    assert token not in str(caught.value)


def test_the_token_comes_from_the_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(command.TOKEN_VARIABLE, f" {TOKEN}\n")
    assert command.read_token(None, "0.0.0.0") == TOKEN
    (tmp_path / "token").write_text("another-token-of-the-tests")
    assert command.read_token(tmp_path / "token", "0.0.0.0") == "another-token-of-the-tests"
    monkeypatch.delenv(command.TOKEN_VARIABLE)
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "::1"):
        assert command.read_token(None, host) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (command.DEFAULT_MAX_NEW_TOKENS, command.DEFAULT_MAX_NEW_TOKENS)),
        (["--max-new-tokens", "5000"], (5000, 5000)),
        (["--max-tokens", "20"], (20, command.DEFAULT_MAX_NEW_TOKENS)),
        (["--max-tokens", "20", "--max-new-tokens", "10"], (10, 10)),
    ],
)
def test_a_reply_runs_to_its_end_unless_a_flag_says_how_long_it_may_be(flags, expected):
    assert command.reply_lengths(command.parser().parse_args(flags)) == expected


def test_an_origin_is_taken_as_browsers_send_it():
    given = ["HTTPS://Chat.Example/", "http://a.example:80", "https://a.example:444", "chrome-extension://abc"]
    expected = ["https://chat.example", "http://a.example", "https://a.example:444", "chrome-extension://abc"]
    assert command.parser().parse_args(["--allow-origin", *given]).allow_origin == expected


def test_without_its_packages_the_server_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(SystemExit):
        command.main(["--model", "/nowhere"])
    assert capsys.readouterr().err == (
        "error: the server needs starlette and uvicorn, which are not installed: pip install -e '.[server]'\n"
    )


def server_section() -> str:
    readme = (ROOT / "inference" / "README.md").read_text(encoding="utf-8")
    return readme.partition("\n## Server\n")[2].partition("\n## ")[0]


def test_the_readmes_client_gets_a_reply(trained, capsys):
    example = re.search(r"```python\n(.*?)```", server_section(), re.DOTALL)[1]
    exec(example.replace("http://127.0.0.1:8000", trained.address).replace("NAME", "tiny").replace("Hello", "hello"))
    assert capsys.readouterr().out == "first"


def test_the_readme_names_every_flag_of_the_server():
    readme = server_section()
    shared = {"--model", "--max-tokens"}
    flags = {flag for action in command.parser()._actions for flag in action.option_strings}
    documented = set(re.findall(r"`(--[\w-]+)", readme))
    own = {"--host", "--port", "--allow-host", "--token-file", "--max-queue", "--max-body", "--max-new-tokens"}
    own |= {"--max-rate", "--allow-origin", "--timeout", "--cached-conversations", "--access-log"}
    assert own <= documented <= flags | shared
