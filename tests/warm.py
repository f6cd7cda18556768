"""Python with torch, vLLM and transformers imported already: a program starts in no time.

    warm.python() in place of [sys.executable], in a test whose subject is not start-up

Imports are most of what a run of one small step takes. Here a server imports once and forks for
every command and every rank. A command stays a process with arguments, environment, working folder
and files of its own, and imports the project's modules anew. A rank is never forked by its
launcher, whose threads it would lack: to free the launcher's store would wait for one of them.
What differs: variables that a library reads as it is imported (HF_HOME, OMP_WAIT_POLICY, glibc's)
have no effect.
"""

import atexit
import contextlib
import ctypes
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
import time
import traceback
from pathlib import Path

ADDRESS = "WARM_PYTHON"  # variable of the tests' process: the path of the server's socket
ROOM = " " * 4000  # in the server's arguments, for those of a command
FORWARDED = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


# --------------------------------------------------------------------------------- pytest's process


def python() -> list[str]:
    """How a command begins that runs in a fork; starts the server if there is none.

    The first call is the main thread's: the server ends with the thread that started it.
    """
    if ADDRESS not in os.environ:
        start_server()
    deadline = time.monotonic() + 300
    while not os.path.exists(os.environ[ADDRESS]):
        assert time.monotonic() < deadline, "the server of warm.py has failed"
        time.sleep(0.05)
    return [sys.executable, "-S", "-E", __file__, os.environ[ADDRESS]]


def start_server() -> None:
    """Start a server for this process and its children, which imports while they go on."""
    os.environ[ADDRESS] = tempfile.mkdtemp() + "/socket"
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    command = [sys.executable, __file__, "serve", os.environ[ADDRESS], ROOM]
    atexit.register(subprocess.Popen(command, env=environment).kill)


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it has ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ------------------------------------------------------------------------------------------ client


def client(address: str, words: list[str]) -> int:
    """Let the server run `python WORDS` with this process's files; returns its exit code."""
    if "RANK" in os.environ:
        die_with_parent()  # with its launcher; then the server kills the rank
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
    code = server.recv(4)
    return int.from_bytes(code, "big", signed=True) if code else 1


# ------------------------------------------------------------------------------------------ server


def warm_up() -> None:
    """Import what the programs import. No library may start a thread: a fork would lose it."""
    import torch

    torch._dynamo.config.disable = True  # while vLLM is imported, as workarounds.prepare_cpu_engine
    import matplotlib.pyplot  # noqa: F401
    import pandas  # noqa: F401
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.run
    import tyro  # noqa: F401
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401
    from vllm import LLM  # noqa: F401

    torch._dynamo.config.disable = False
    # torchrun names each caller by a walk through all modules, a second in all.
    torch.distributed.elastic.rendezvous.dynamic_rendezvous.get_method_name = lambda depth=0: ""
    gc.collect()
    gc.freeze()  # a collection in a fork passes over all this


def serve(address: str) -> None:
    """Fork for every connection, hand signals on, and answer with the exit code."""
    die_with_parent()
    warm_up()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    selector = selectors.DefaultSelector()
    for source in (listener, woken):
        selector.register(source, selectors.EVENT_READ)
    commands = {}  # connection -> process
    while True:
        for key, _ in selector.select():
            source = key.fileobj
            if source is listener:
                connection, _ = listener.accept()
                size, files, _, _ = socket.recv_fds(connection, 4, 3)
                request = b""
                while len(request) < int.from_bytes(size, "big"):
                    request += connection.recv(1 << 16)
                commands[connection] = os.fork()
                if not commands[connection]:
                    be_the_command(address, *json.loads(request), files)
                for file in files:
                    os.close(file)
                selector.register(connection, selectors.EVENT_READ)
            elif source is woken:
                woken.recv(1 << 16)
            elif source in commands:
                number = source.recv(1)
                os.kill(commands[source], number[0] if number else signal.SIGKILL)
                if not number:  # the client was killed
                    selector.unregister(source)
        for connection, pid in list(commands.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del commands[connection]
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):
                    connection.sendall(code.to_bytes(4, "big", signed=True))
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                connection.close()


def be_the_command(
    address: str, words: list[str], folder: str, environment: dict, files: list[int]
) -> None:
    """In the fork: run `python WORDS` in a folder and environment, with these files 0, 1, 2."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    die_with_parent()
    signal.set_wakeup_fd(-1)
    for i, file in enumerate(files):
        os.dup2(file, i)
    os.chdir(folder)
    start, here = SubprocessHandler._popen, [sys.executable, "-S", "-E", __file__, address]
    SubprocessHandler._popen = lambda self, words, env: start(self, (*here, *words[1:]), env)
    run(words, environment)


def run(words: list[str], environment: dict) -> None:
    """In a fork: run `python WORDS` as Python itself would, and end this process."""
    import torch

    os.closerange(3, 1024)
    show(words)
    os.environ.clear()
    os.environ.update(environment)
    for number in (*FORWARDED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    words = [word for word in words if word != "-u"]
    named = words[0] in ("-m", "-c")
    sys.path[0] = os.getcwd() if named else str(Path(words[0]).resolve().parent)
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(":"))
    sys.argv = words[1:] if named else words
    code = 1
    try:
        code = execute(words)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def execute(words: list[str]) -> int:
    """`python WORDS`, up to its exit code."""
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        traceback.print_exc()
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def show(words: list[str]) -> None:
    """Let /proc and ps show these words; the server's own arguments leave room."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    text = "\0".join(["python", *words]).encode()[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    code = client(sys.argv[1], sys.argv[2:])
    if code < 0:  # ended by this signal, and so does the client
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
