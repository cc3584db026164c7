"""A server that has NeMo loaded and forks for every command of a test, which then starts 12 s of CPU time sooner."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

# What stands under a command's name: hands arguments, folder, environment and files over, and ends with the status.
CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([{program!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(int.from_bytes(server.recv(1) or b"\\1", "big"))
"""


@contextlib.contextmanager
def warm_commands(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Inside, ``nemo-llm-feedback`` and ``python`` in a folder are commands of this checkout that start at once.

    Args:
        folder: where the two commands are written.
        environment: the server's; a command has its caller's but for what Python reads at its start (PYTHONPATH).
    """
    folder.mkdir(parents=True, exist_ok=True)
    address = folder / "socket"
    for name, program in {"nemo-llm-feedback": ["-m", "nemo_llm_feedback.cli.main"], "python": []}.items():
        text = CLIENT.format(python=sys.executable, address=str(address), program=program)
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(address)], env=environment)
    try:
        while not address.exists():
            if server.poll() is not None:
                raise RuntimeError(f"the server of commands ended with {server.returncode}")
            time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def serve(address: str) -> None:
    """Loads what commands load, and answers until it is killed."""
    import nemo_llm_feedback.cli.jobs.adapt
    import nemo_llm_feedback.cli.jobs.evaluate
    import nemo_llm_feedback.cli.jobs.transcribe
    import nemo_llm_feedback.llm.loading  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".part")
        server.listen()
        os.rename(address + ".part", address)
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                status = _answer(client)
                with contextlib.suppress(BrokenPipeError):
                    client.sendall(bytes([status]))
                os._exit(status)
            client.close()


def _answer(client: socket.socket) -> int:
    """Runs a request in this process, as Python would by itself, and gives its status."""
    size, files, *_ = socket.recv_fds(client, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(1 << 16)
    arguments, folder, environment = json.loads(request)
    for target, source in enumerate(files):
        os.dup2(source, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    try:
        _run(arguments)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _run(arguments: list[str]) -> None:
    """``-m MODULE …`` or ``-c CODE …``."""
    kind, what, *rest = arguments
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    serve(sys.argv[1])
