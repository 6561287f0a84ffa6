"""A server that can start no thread, or has no descriptor left, refuses a client and goes on."""

import errno
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from onionskin.base import threads
from onionskin.control import frames
from onionskin.control import server as control
from onionskin.nbd import tls_carrier
from onionskin.nbd.tls_carrier import TlsCarrier


class Refusing(threading.Thread):
    """A thread that cannot be started."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


class Dying(threads.SureThread):
    """A thread that dies before it can say that it runs, for want of memory."""

    def _bootstrap(self) -> None:
        pass


@pytest.mark.parametrize("kind", [Refusing, Dying])
def test_a_client_with_tls_is_refused_and_its_place_is_free_again(
    monkeypatch: pytest.MonkeyPatch, kind: type[threading.Thread]
) -> None:
    said: list[str] = []
    carrier = TlsCarrier(1, hand_over=lambda connection, peer: None, log=said.append)
    monkeypatch.setattr(tls_carrier, "SureThread", kind)
    monkeypatch.setattr(threads, "START_SECONDS", 0.0)
    for _ in range(3):
        ours, its = socket.socketpair()
        carrier.serve(its, "somebody", None)  # type: ignore[arg-type]
        with ours:
            assert ours.recv(1) == b""
    assert said == ["somebody: refused: no thread could be started for it"] * 3


def test_a_client_with_tls_for_which_there_is_no_descriptor_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    carrier = TlsCarrier(1, hand_over=lambda connection, peer: None, log=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "dup", lambda self: refuse(errno.EMFILE))
        for _ in range(3):
            ours, its = socket.socketpair()
            with ours, its, pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                carrier.serve(its, "somebody", None)  # type: ignore[arg-type]
    carrier.join()  # it waits for no thread that was never started
    assert carrier._take_place()
    assert not said


def refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


def ask(path: Path) -> Any:
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect(str(path))
        return frames.receive(ours, bytes_max=frames.REPLY_BYTES_MAX)


@pytest.mark.parametrize("kind", [Refusing, Dying])
def test_a_caller_of_the_control_socket_is_refused_and_the_next_one_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[threading.Thread]
) -> None:
    said: list[str] = []
    listening = control.ControlSocket(tmp_path / "control", None, said.append)  # type: ignore[arg-type]
    monkeypatch.setattr(threads, "START_SECONDS", 0.0)
    try:
        monkeypatch.setattr(control, "SureThread", kind)
        for _ in range(2):
            assert "could start no thread" in str(ask(tmp_path / "control"))
        assert len(said) == 2
    finally:
        listening.close()


def test_the_control_socket_goes_on_when_there_are_descriptors_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poor:
        """A listening socket whose first accept finds no descriptor."""

        def __init__(self, real: socket.socket) -> None:
            self.real = real
            self.failures = 1

        def accept(self) -> Any:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return self.real.accept()

        def fileno(self) -> int:
            return self.real.fileno()

        def setblocking(self, flag: bool) -> None:
            self.real.setblocking(flag)

        def close(self) -> None:
            self.real.close()

    class PoorListener(control.UnixListener):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.socket = Poor(self.socket)  # type: ignore[assignment]

    said: list[str] = []
    monkeypatch.setattr(control, "UnixListener", PoorListener)
    listening = control.ControlSocket(tmp_path / "control", None, said.append)  # type: ignore[arg-type]
    try:
        monkeypatch.setattr(control, "may_connect", lambda uid, owner: False)
        assert "may not use it" in str(ask(tmp_path / "control"))
        assert "could not be accepted: Too many open files" in said[0]
    finally:
        listening.close()
