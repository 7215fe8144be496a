"""A python that starts in milliseconds: it forks from a server that has imported torch, transformers and the chat.

A command that chats takes five seconds of a core to start from scratch, nearly all of it for imports. `Server` makes a
program `bin/python` that has the server run the script (or `-c CODE`, or `-m MODULE`) instead, with its own arguments,
environment, folder and streams, forwards signals, and ends as the script does. Differences to a start from scratch:
modules are imported already, limits and sessions are the server's. Where the start itself is the subject of a test,
sys.executable starts from scratch.
"""

import atexit
import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import types
from pathlib import Path

# What libraries read from the environment as they are imported: it must be as it was for the server.
_READ_EARLY = ("HF_", "TRANSFORMERS_", "CUDA_", "LD_", "PYTHON")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGWINCH)

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in {signals}:
    signal.signal(number, lambda number, _: server.send(bytes([number])))
request = json.dumps([sys.argv[0], sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
answer = b""
while len(answer) < 4 and (more := server.recv(4)):
    answer += more
status = int.from_bytes(answer, "big", signed=True) if len(answer) == 4 else 1
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class Server:
    """The server, in a folder that looks like a virtual environment: `folder / "bin" / "python"` is the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir(parents=True)
        address = str(folder / "socket")
        text = _CLIENT.format(python=sys.executable, address=address, signals=[*map(int, _FORWARDED)])
        self.python.write_text(text)
        self.python.chmod(0o755)
        # It ends when its input does, so with this process at the latest.
        self._process = subprocess.Popen(
            [sys.executable, __file__, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _serve(address: str) -> None:
    """Run what clients ask for, each in a process of its own, until the end of the input."""
    import torch  # noqa: F401
    import transformers.models.gpt_neox.modeling_gpt_neox
    import transformers.models.gptj.modeling_gptj  # noqa: F401

    import openchatkit.inference.bot
    import openchatkit.inference.loading.loader
    import openchatkit.inference.responder
    import openchatkit.inference.shell.commands
    import openchatkit.training.setup  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    ended, wakeup = os.pipe()
    for descriptor in (ended, wakeup):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C for pytest reaches the whole group
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for file in (listener, ended, sys.stdin):
            selector.register(file, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    clients[_start(client)] = client
                    selector.register(client, selectors.EVENT_READ)
                elif key.fileobj == ended:
                    os.read(ended, 4096)
                elif key.fileobj is sys.stdin:
                    for pid in clients:
                        os.kill(pid, signal.SIGKILL)
                    return
                else:
                    pid = next(pid for pid, client in clients.items() if client is key.fileobj)
                    numbers = key.fileobj.recv(16)
                    for number in numbers or [signal.SIGKILL]:
                        os.kill(pid, number)
                    if not numbers:
                        selector.unregister(key.fileobj)
            while clients:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                client = clients.pop(pid)
                with contextlib.suppress(KeyError):
                    selector.unregister(client)
                with contextlib.suppress(OSError):
                    client.sendall(struct.pack(">i", os.waitstatus_to_exitcode(status)))
                client.close()


def _start(client: socket.socket) -> int:
    head, descriptors, _, _ = socket.recv_fds(client, 4, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size:
        request += client.recv(size - len(request))
    pid = os.fork()
    if not pid:
        status = 1
        try:
            client.close()
            status = _run(*json.loads(request), descriptors)
        except BaseException:
            traceback.print_exc(file=open(2, "w", buffering=1, closefd=False))  # noqa: SIM115
        finally:
            os._exit(status)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


def _run(program: str, arguments: list[str], environment: dict[str, str], folder: str, descriptors: list[int]) -> int:
    """In the new process: run a script as Python would; return its exit status."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115 - they last
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    early = {name for name in {*environment, *os.environ} if name.startswith(_READ_EARLY)}
    if changed := sorted(name for name in early if environment.get(name) != os.environ.get(name)):
        raise AssertionError(f"{', '.join(changed)} came too late: start this from scratch, by sys.executable")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = program
    import torch
    from loguru import logger

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    logger.remove()
    logger.add(sys.stderr)
    try:
        _execute(arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status


def _execute(arguments: list[str]) -> None:
    what = arguments[0]
    if what == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    elif what == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(what))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
