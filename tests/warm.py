"""Starts commands in milliseconds: processes of their own, forked from one that has imported the package.

To import PyTorch and its relatives takes seconds, and tests start hundreds of processes. `warm_command()` is the
beginning of a command line, for `subprocess` or torchrun: a small process, which has a server fork the real one, gives
it its arguments, environment, folder, standard streams and ignored signals, passes signals on to it and ends as it
does. If the small process is killed, the real one is killed too. What depends on the very start of a process (imports,
variables that libraries other than huggingface_hub read while they are imported, limits, groups of processes) needs
`COLD_COMMAND`.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

COLD_COMMAND = [sys.executable, "-c", "from mapet.cli import main; main()"]
COLD_TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PRELOADED = (
    "mapet.quickstart.demo",
    "mapet.tokenize_stage.tokenizers.published",
    "mapet.tokenize_stage.towers.opening",
    "mapet.train_stage.evaluate",
    "mapet.train_stage.segment",
    "mapet.shared.runtime.static_signature",
    "timm.models.vision_transformer",
    "torch.distributed.run",
    "typer.rich_utils",
    "faiss",
    "zarr",
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SHARED = "MAPET_TESTS_SERVER"  # the environment variable with the socket of a shared server
LONGEST_MESSAGE = 1 << 17


def warm_command() -> list[str]:
    """The command line of `mapet`, without its arguments."""
    return [*_client(), "mapet"]


def warm_python() -> list[str]:
    """The command line of Python, without the script or `-c` and its code, and their arguments."""
    return [*_client(), "python"]


def warm_torchrun() -> list[str]:
    """The command line of torchrun, without its arguments. Its processes are not warm by that alone."""
    return [*_client(), "torchrun"]


def processes_of(argument: object) -> list[int]:
    """The small processes, without torchrun, of commands that have this argument, which no other has; oldest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(argument).encode() in words and b"--no-python" not in words:
                found.append(int(path.parent.name))
    return sorted(found)


def share() -> None:
    """Starts one server for the processes that this one starts, which are those of pytest-xdist."""
    os.environ[SHARED] = _serving()


@functools.cache
def _client() -> list[str]:
    return [sys.executable, "-S", "-E", __file__, "start", os.environ.get(SHARED) or _serving()]


def _serving() -> str:
    """The socket of a server that ends with this process."""
    path = Path(tempfile.mkdtemp(prefix="warm-")) / "socket"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(path))
    listening.listen(64)
    descriptor = listening.fileno()
    # The server ends when this process does, which closes the pipe.
    subprocess.Popen([sys.executable, __file__, "serve", str(descriptor)], stdin=subprocess.PIPE, pass_fds=[descriptor])
    return str(path)


def start(path: str, name: str, arguments: list[str]) -> None:
    """The small process: has the real one forked, and ends as it does."""
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    request = {"name": name, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    request["ignored"] = ignored
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(path)
    early: list[int] = []
    passed_on = [number for number in PASSED_ON if number not in ignored]
    for number in passed_on:
        signal.signal(number, lambda number, _: early.append(number))
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    pid = int(connection.recv(64))
    for number in passed_on:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    for number in early:
        os.kill(pid, number)
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    code = int(connection.recv(64))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(listening: socket.socket) -> dict | None:
    """Forks a process for each request until standard input ends; returns in the fork, with its request."""
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    waiting.register(sys.stdin.fileno(), selectors.EVENT_READ)
    clients: dict[int, tuple[int, socket.socket]] = {}  # by the pidfd of the forked process
    while True:
        for key, _ in waiting.select():
            if key.fileobj == sys.stdin.fileno():
                return None
            if key.fileobj is listening:
                connection, _ = listening.accept()
                message, streams, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, 3)
                pid = os.fork()
                if pid == 0:
                    waiting.close()
                    for open_one in (listening, connection, *(client for _, client in clients.values())):
                        open_one.close()
                    for descriptor in clients:
                        os.close(descriptor)
                    for descriptor, stream in enumerate(streams):
                        os.dup2(stream, descriptor)
                        os.close(stream)
                    return json.loads(message)
                for stream in streams:
                    os.close(stream)
                descriptor = os.pidfd_open(pid)
                clients[descriptor] = (pid, connection)
                waiting.register(descriptor, selectors.EVENT_READ)
                waiting.register(connection, selectors.EVENT_READ, descriptor)
                connection.send(str(pid).encode())
            elif key.data is not None:  # the small process was killed
                waiting.unregister(key.fileobj)
                os.kill(clients[key.data][0], signal.SIGKILL)
            else:
                waiting.unregister(key.fd)
                os.close(key.fd)
                pid, connection = clients.pop(key.fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError, KeyError, ValueError):
                    waiting.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
                connection.close()


def run(request: dict) -> None:
    """What the forked process is for."""
    os.chdir(request["folder"])
    if any(name.startswith("HF_") and os.environ.get(name) != value for name, value in request["environment"].items()):
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]  # it reads its variables while it is imported
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # it is read from the environment once
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    script = request["name"] == "python"
    sys.argv = request["arguments"] if script else [request["name"], *request["arguments"]]
    # Those of the server are what its own standard streams were: files, perhaps.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if script and sys.argv[0] == "-c":
        main = functools.partial(exec, sys.argv.pop(1), {"__name__": "__main__"})
    elif script:
        sys.path[0] = str(Path(sys.argv[0]).parent)
        main = functools.partial(runpy.run_path, sys.argv[0], run_name="__main__")
    elif request["name"] == "torchrun":
        from torch.distributed.run import main
    else:
        from mapet.cli import main
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    # The end of an interpreter without the destruction of every module, which would copy the memory of the server.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "start":
        start(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        import importlib

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test run ends by closing the pipe
        sys.path[0] = ""  # as with -c, instead of the folder of this file
        for module in PRELOADED:
            importlib.import_module(module)
        gc.freeze()  # or each fork copies the memory of the server when it collects garbage
        request = serve(socket.socket(fileno=int(sys.argv[2])))
        if request is not None:
            run(request)
        os._exit(0)
