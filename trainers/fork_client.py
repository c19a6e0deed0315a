"""The command that stands for a fork of `fork_server`.

    python -I -S THIS_FILE SOCKET SCRIPT ARGUMENT...

It runs without any package, this one's included.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys

_LENGTH = struct.Struct("!Q")
_NUM_FILES = 3
TAKEN = b"T"


def main() -> None:
    where, *arguments = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(where)
            send(connection, arguments)
            is_taken = connection.recv(1) == TAKEN
        except OSError:
            is_taken = False
        if is_taken:
            # Until the fork ends, which holds the other end.
            connection.recv(1)
            return
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - what Ray asked for


def send(connection: socket.socket, arguments: list[str]) -> None:
    """Tells what this process is to be, with its standard input, output and errors."""
    asked = json.dumps(
        {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    ).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(asked))], list(range(_NUM_FILES)))
    connection.sendall(asked)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """What `send` has told, and the files; says that it is taken. EOFError where the other end is
    gone."""
    head, files, _, _ = socket.recv_fds(connection, _LENGTH.size, _NUM_FILES)
    if len(head) < _LENGTH.size:
        raise EOFError
    [length] = _LENGTH.unpack(head)
    with connection.makefile("rb") as body:
        asked = body.read(length)
    if len(asked) < length:
        raise EOFError
    connection.sendall(TAKEN)
    return asked, files


if __name__ == "__main__":
    main()
