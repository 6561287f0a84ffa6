"""TLS with pre-shared keys: what a file of them may hold, and the handshake where this Python can do it."""

import socket
import ssl
import struct
import threading
from pathlib import Path

import pytest

import onionskin
from onionskin.nbd import tls

KEY = bytes(range(32))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text(f"# of two machines\nhost-1:{KEY.hex()}\n\nhost:2:{'ab' * 16}\n")
    path.chmod(0o600)
    return path


def test_keys_are_read_with_the_names_of_their_owners(keys: Path) -> None:
    assert tls.read_keys(keys) == {"host-1": KEY, "host:2": b"\xab" * 16}


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "web\n", "web:xyz\n", "web:00ff\n", ":" + "00" * 32, "web:" + "0" * 600]
)
def test_a_file_with_anything_else_than_keys_is_refused(keys: Path, text: str) -> None:
    keys.write_text(text)
    with pytest.raises(ValueError, match="psktool"):
        tls.read_keys(keys)


def test_keys_that_everybody_can_read_are_refused(keys: Path) -> None:
    keys.chmod(0o644)
    with pytest.raises(onionskin.StateError, match="chmod 600"):
        tls.read_keys(keys)


if getattr(ssl, "HAS_PSK", False):

    def connect(keys: Path, name: str, key: bytes, version: ssl.TLSVersion) -> str:
        """Shake hands as an NBD client; returns whom the server took it for, and raises where it was sent away."""
        ours, servers = socket.socketpair()
        said = []

        def serve() -> None:
            try:
                with tls.accept(servers, tls.terms_by_key(keys)) as outer:
                    said.append(tls.owner(outer))
                    outer.sendall(b"hello")
            except tls.Refused as refusal:
                said.append(refusal)

        thread = threading.Thread(target=serve)
        thread.start()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        context.set_ciphers("kECDHEPSK")
        context.set_psk_client_callback(lambda hint: (name, key))
        ours.settimeout(300)
        ours.recv(18, socket.MSG_WAITALL)
        ours.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 5, 0))
        ours.recv(20, socket.MSG_WAITALL)
        try:
            with context.wrap_socket(ours) as inner:
                assert inner.recv(5) == b"hello"
        finally:
            ours.close()
            thread.join()
        return said[0]

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_a_client_comes_in_by_its_key(keys: Path, version: ssl.TLSVersion) -> None:
        assert connect(keys, "host-1", KEY, version) == "host-1"
        assert connect(keys, "host:2", b"\xab" * 16, version) == "host:2"

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    @pytest.mark.parametrize("name", ["host-1", "host:2", "nobody", ""])
    def test_a_client_with_another_key_does_not(keys: Path, version: ssl.TLSVersion, name: str) -> None:
        with pytest.raises((OSError, AssertionError)):
            connect(keys, name, bytes(32), version)

else:

    def test_a_python_without_pre_shared_keys_says_what_to_use_instead(keys: Path) -> None:
        with pytest.raises(onionskin.StateError, match=r"need Python 3\.13.*use --tls-certificate"):
            tls.terms_by_key(keys)
