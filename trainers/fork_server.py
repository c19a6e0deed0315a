"""Workers of this machine as forks of a process that has loaded what they need.

    with fork_server() as python:       # started at once; loads while Ray starts
        runtime_env = {"py_executable": python}

Ray then runs `python default_worker.py ...`. The command hands its arguments, environment and open
files to the server, whose fork goes on as that worker, and waits for it to end. So modules are
loaded once for all workers, also for those that are started again. Where the server is gone the
command is Python itself.

The server runs no code in a second thread and touches no device: neither survives a fork. Nor does
it load Ray, which reads its settings and the cluster's token as it is loaded. It ends with the
process that has started it.
"""

from __future__ import annotations

import json
import logging
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainers import fork_client
from trainers.loading import without_collections

_BACKLOG = 128

_log = logging.getLogger(__name__)


@contextmanager
def fork_server() -> Iterator[str | None]:
    """A server while the block lasts, and the command that starts its forks.

    None where it cannot be, as where the path of temporary files is too long for a socket.
    """
    with ExitStack() as stack:
        try:
            command = stack.enter_context(_server())
        except OSError as error:
            _log.info("workers are started one by one: %s", error)
            command = None
        yield command


@contextmanager
def _server() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="shoal-fork-") as folder:
        where = str(Path(folder, "server"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(where)
            listener.listen(_BACKLOG)  # who connects before it has loaded waits
            server = subprocess.Popen(  # noqa: S603 - our own program, no shell
                [sys.executable, "-m", "trainers.fork_server", str(listener.fileno())],
                # What waits in threads of its own would be lost to the forks.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,  # closed at the end of this process, however it comes
                pass_fds=[listener.fileno()],
            )
        try:
            # Quick to start: it needs nothing but what is built in.
            yield shlex.join([sys.executable, "-I", "-S", str(fork_client.__file__), where])
        finally:
            server.kill()
            server.communicate()


def main() -> None:
    # As Ray starts its processes: Ctrl-C is for the driver, which asks them to stop.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    listener = socket.socket(fileno=int(sys.argv[1]))
    with without_collections():
        import trainers.worker  # noqa: F401
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that end leave nothing to collect
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(sys.stdin.fileno(), selectors.EVENT_READ)
        while all(key.fileobj is listener for key, _ in ready.select()):
            connection, _ = listener.accept()
            with connection:
                try:
                    is_fork = os.fork() == 0
                except OSError as error:
                    sys.stderr.write(f"shoal: no fork, so a worker starts by itself: {error}\n")
                    continue
                if is_fork:
                    ready.close()
                    listener.close()
                    _go_on(connection)


def _go_on(connection: socket.socket) -> None:
    """As the fork: be the process that the command at the other end stands for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        asked, files = fork_client.receive(connection)
    except (EOFError, ConnectionError):
        os._exit(0)  # nobody needs this process any more
    for number, file in enumerate(files):
        if file != number:
            os.dup2(file, number)
            os.close(file)
    held = json.loads(asked)
    os.environ.clear()
    os.environ.update(held["environment"])
    os.chdir(held["folder"])
    sys.argv = held["arguments"]
    connection.detach()  # open for as long as this process lives: so the other end learns of it
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    main()
