"""The connection to the preload library, against a program that answers as that would."""

import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from onionskin.machine import preload
from onionskin.machine.preload import Preload


def answer(start: int) -> bytes:
    return preload._REPLY.pack(preload._MAGIC, 0, start, 4096, 1, 1)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_answer_to_what_is_asked_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preload, "SECONDS", 0.1)
    given_up = threading.Event()

    def serve(listener: socket.socket) -> None:
        first, _ = listener.accept()
        with first:
            first.recv(preload._REQUEST.size)
            assert given_up.wait(300)
            with suppress(BrokenPipeError):  # nobody waits for it
                first.sendall(answer(1))
                if first.recv(preload._REQUEST.size):
                    first.sendall(answer(2))
                    return
        second, _ = listener.accept()
        with second:
            second.recv(preload._REQUEST.size)
            second.sendall(answer(2))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "preload"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with Preload(tmp_path / "preload") as connection:
            with pytest.raises(TimeoutError):
                connection.where()
            monkeypatch.setattr(preload, "SECONDS", 300.0)
            given_up.set()
            assert connection.where().start == 2
        thread.join()
