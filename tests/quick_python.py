"""A python that starts in milliseconds: it forks from a server that has imported torch, transformers and more.

A command that chats takes seven seconds of a core to start from scratch and answer, six of them for imports. `Server`
makes a program `bin/python` that has the server run the script (or `-c CODE`, `-m MODULE`, or `-`: a program on stdin)
instead, with its own arguments, environment, folder and streams, forwards signals, and ends as the script does.
Differences to a start from scratch: modules are imported already, limits and sessions are the server's. Where the start
itself is the subject of a test, sys.executable starts from scratch.
"""

import atexit
import contextlib
import fcntl
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
_USE = (0).to_bytes(4, "big")  # in place of a request's length
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
    """The server that all workers of a session share; its `folder` looks like a virtual environment.

    `python` is the program, `folder / "bin" / "python"`. The server ends with the last of those that use it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._address = folder / "socket"
        self._process: subprocess.Popen | None = None
        self._use = socket.socket(socket.AF_UNIX)
        self.python.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self._use.connect(str(self._address))
            except OSError:
                self._start()
                self._use.connect(str(self._address))
            self._use.sendall(_USE)
            assert self._use.recv(1) == b"+"

    def _start(self) -> None:
        text = _CLIENT.format(python=sys.executable, address=str(self._address), signals=[*map(int, _FORWARDED)])
        self.python.write_text(text)
        self.python.chmod(0o755)
        self._address.unlink(missing_ok=True)
        self._process = subprocess.Popen([sys.executable, __file__, self._address], stdout=subprocess.PIPE)
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """Use it no longer; the one that has started it waits for its end, since it may write coverage then."""
        self._use.close()
        if self._process:
            self._process.wait()


def _serve(address: str) -> None:
    """Run what clients ask for, each in a process of its own, until nobody uses the server any more."""
    import faiss  # noqa: F401
    import sentence_transformers  # noqa: F401
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
    users: set[socket.socket] = set()
    with selectors.DefaultSelector() as selector:
        for file in (listener, ended):
            selector.register(file, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    if pid := _start(client):
                        clients[pid] = client
                    else:
                        users.add(client)
                    selector.register(client, selectors.EVENT_READ)
                elif key.fileobj == ended:
                    os.read(ended, 4096)
                elif key.fileobj in users:
                    users.remove(key.fileobj)
                    selector.unregister(key.fileobj)
                    if not users:
                        for pid in clients:
                            os.kill(pid, signal.SIGKILL)
                        return
                else:
                    pid = next(pid for pid, client in clients.items() if client is key.fileobj)
                    numbers = _receive(key.fileobj, 16)
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


def _receive(client: socket.socket, size: int) -> bytes:
    """Receive at most so many bytes; none where the client is gone."""
    try:
        return client.recv(size)
    except OSError:
        return b""


def _start(client: socket.socket) -> int:
    """Start what a client asks for and return its process's number; 0 for one who only uses the server."""
    head, descriptors, _, _ = socket.recv_fds(client, 4, 3)
    if head == _USE:
        client.sendall(b"+")
        return 0
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size and (more := _receive(client, size - len(request))):
        request += more
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
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        arguments = arguments[1:]
    what = arguments[0]
    if what in ("-c", "-"):
        code, rest = (arguments[1], arguments[2:]) if what == "-c" else (sys.stdin.read(), arguments[1:])
        sys.argv, sys.path[0] = [what, *rest], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif what == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(what))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
